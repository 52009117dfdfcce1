"""What a method makes of the removed neurons, and the only code that puts it into a network.

A method gives a `Decomposition` and changes nothing. `narrow` fills the surviving columns with it, and slices every
tensor to the survivors.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nm_lightning.compression.report import SiteReport
from nm_lightning.compression.structure.columns import absorb, put, rows_of
from nm_lightning.compression.structure.copies import duplicate, own_tensors
from nm_lightning.compression.structure.plan import Plan, apply_plan, named_tensors, plan_sites, replace_tensors
from nm_lightning.compression.structure.sites import Consumer, Site


@dataclass
class Scaling:
    """The matrix `Z` on the way to one consumer: what each of the site's neurons is made of.

    Attributes:
        consumer: the layer that reads the neurons.
        keep: `(k,)`, the survivors.
        matrix: `Z`, `(n, k)`.
        multiply: how the consumer's columns take it in: `absorb`, or the paper's loops.
    """

    consumer: Consumer
    keep: Tensor
    matrix: Tensor
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor] = absorb

    def into(self, weight: Tensor) -> Tensor:
        """A copy of the consumer's weight with the survivors' columns filled; its rows may be sliced already."""
        weight = weight.clone()
        consumer, columns = self.consumer, weight.movedim(self.consumer.slots[0][1], 1)
        positions, keep, matrix = (
            tensor.to(weight.device) for tensor in (consumer.positions(), self.keep, self.matrix)
        )
        if consumer.groups == 1:
            put(columns, positions, keep, self.multiply(columns, positions, matrix))
        else:
            put(columns, positions, keep, absorb(columns, positions, matrix, keep, consumer.groups), consumer.groups)
        return weight


@dataclass
class Decomposition:
    """What becomes of a network's neurons. What is not mentioned stays as it is, and is sliced.

    Attributes:
        keeps: by site, the survivors `(k,)`, ascending.
        rows: by site, its row of the report.
        scalings: how consumers take in the removed neurons; the columns of the others are dropped.
        tensors: by name, values that replace the network's at their full width, in any floating-point dtype.
        biases: by layer, `(out,)`, a bias that it gets.
    """

    keeps: dict[str, Tensor]
    rows: dict[str, SiteReport]
    scalings: list[Scaling] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def pruned(cls, sites: Sequence[Site], keeps: Mapping[str, Tensor], method: str = "prune") -> "Decomposition":
        """Nothing but the survivors, to begin with."""
        return cls(dict(keeps), {site.name: SiteReport(site.name, site.width, len(keeps[site.name]), method)
                                 for site in sites})  # fmt: skip

    @property
    def slices_only(self) -> bool:
        """Whether no value changes."""
        return not (self.scalings or self.tensors or self.biases)

    def shrinking(self, sites: Sequence[Site]) -> list[tuple[Site, SiteReport, Tensor]]:
        """The sites that lose neurons, with their rows and survivors."""
        keeps = self.keeps
        return [(site, self.rows[site.name], keeps[site.name]) for site in sites if len(keeps[site.name]) < site.width]


@torch.no_grad()
def narrow(model: nn.Module, sites: Sequence[Site], decomposition: Decomposition) -> tuple[nn.Module, Plan]:
    """The narrow network, and the plan that repeats its slicing.

    Args:
        model: the wide network, its weights plain tensors; it is only read.
        sites: all that the decomposition speaks of.
        decomposition: what becomes of them.

    Returns:
        A network of the same class that shares no memory with the wide one.
    """
    originals = named_tensors(model)
    result = duplicate(model)
    plan = plan_sites(sites, decomposition.keeps)
    values = decomposition.tensors.items()
    replace_tensors(result, {name: value.to(originals[name].dtype) for name, value in values})
    for name, value in decomposition.biases.items():
        layer = result.get_submodule(name)
        layer.bias = nn.Parameter(value.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        plan.setdefault("biases", {})[name] = len(value)
        rows = [step for step in plan["slices"].get(f"{name}.weight", []) if step[0] == 0]
        plan["slices"] |= {f"{name}.bias": rows} if rows else {}  # it shrinks with the layer's rows
    for name, factor in roots_of(sites, decomposition.keeps, dict(result.named_modules())).items():
        tensors = named_tensors(result)
        queries = {own: tensors[own].detach() for own in rows_of(name, tensors)}
        replace_tensors(
            result, {own: (value.movedim(0, -1) * factor.to(value)).movedim(-1, 0) for own, value in queries.items()}
        )
    scalings = defaultdict(list)
    for scaling in decomposition.scalings:
        scalings[scaling.consumer.slots[0]].append(scaling)

    def filled(name: str, dim: int, tensor: Tensor) -> Tensor:
        for scaling in scalings[name, dim]:
            tensor = scaling.into(tensor)
        return tensor

    apply_plan(result, plan, filled)
    own_tensors(result, originals)
    return result, plan


def roots_of(sites: Sequence[Site], keeps: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """By layer, the factor of each row `(out,)` of a narrow network's: 1, but for the queries of some attentions.

    These are divided by the root of their dimensions, which is counted as the network runs, so they make up for it.
    """
    factors: dict[str, Tensor] = {}
    for site in sites:
        share = len(keeps[site.name]) / site.width
        for pair in site.pairs:
            if pair.rooted and share < 1:
                factors.setdefault(pair.maker, torch.ones(len(layers[pair.maker].weight)))[pair.rows] = share**0.5
    return factors


@torch.no_grad()
def assign(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values of the same shapes into a narrow network's tensors, in place."""
    tensors = named_tensors(model)
    for name, value in values.items():
        tensors[name].copy_(value)
