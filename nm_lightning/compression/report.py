"""What a compression did: one row for each site, the layers left alone, and a network's size and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nm_lightning.compression.decompose import neuron_vectors
from nm_lightning.compression.fold import named_tensors
from nm_lightning.compression.prepare import modes_kept
from nm_lightning.compression.sites import Site


@dataclass
class SiteReport:
    """What happened at one site.

    Attributes:
        name: the producing layer.
        before: neurons of the original.
        after: neurons that stayed.
        method: the method that was used, which may be a fallback.
        merged: removed neurons that were folded into a kept one.
        negative: negative scaling entries, which a ReLU does not pass (the published formulation has some).
        note: why the method fell back, if it did.
        error: share of the consumers' output energy that reconstruction could not restore; None elsewhere.
    """

    name: str
    before: int
    after: int
    method: str
    merged: int = 0
    negative: int = 0
    note: str = ""
    error: float | None = None


@dataclass
class Report:
    """All sites of one compression, the layers that could not be compressed with the reason, and further remarks."""

    sites: list[SiteReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def widths(self) -> dict[str, int]:
        """Neurons that stayed, by site."""
        return {site.name: site.after for site in self.sites}

    @property
    def notes(self) -> list[str]:
        """The sentences that a reader of the result should see."""
        notes = [*self.remarks, *(f"{site.name}: {site.note}" for site in self.sites if site.note)]
        negative = sum(site.negative for site in self.sites)
        if negative:
            notes.append(f"{negative} negative scaling entries kept, as published")
        return notes

    def to_dict(self) -> dict:
        """Plain dictionaries and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table in plain text, a line for each site."""
        rows = [f"{'site':32} {'before':>7} {'after':>7} {'merged':>7}  method"]
        for site in self.sites:
            note = f" ({site.note})" if site.note else ""
            rows.append(f"{site.name:32} {site.before:7} {site.after:7} {site.merged:7}  {site.method}{note}")
        return "\n".join(rows + [f"{name:32} left alone: {reason}" for name, reason in self.skipped.items()])


@torch.no_grad()
def similarity(model: nn.Module, sites: Sequence[Site], keep: Mapping[str, Tensor], bins: int = 20) -> list[int]:
    """How like the survivors the removed neurons were: their largest cosine with one, counted in bins from -1 to 1.

    Args:
        model: the original network.
        sites: as `trace` finds them.
        keep: by site, the survivors; other sites are left out.
        bins: equally wide.
    """
    tensors, counts = named_tensors(model), torch.zeros(bins)
    for site in sites:
        if site.name in keep and site.producers[0].even(site.width) and len(keep[site.name]) < site.width:
            vectors = F.normalize(neuron_vectors(site.producers[0], tensors, with_bias=False).float(), dim=1)
            gone = torch.ones(site.width, dtype=torch.bool)
            gone[keep[site.name]] = False
            nearest = [(part @ vectors[keep[site.name]].T).amax(dim=1) for part in vectors[gone].split(1024)]
            counts += torch.cat(nearest).clamp(-1, 1).cpu().histc(bins, -1, 1)
    return counts.int().tolist()


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    Attributes:
        parameters: number of learned values.
        macs: multiply-accumulates for one image, by torch's flop counter.
    """

    parameters: int
    macs: int


def cost(model: nn.Module, example_input: Tensor) -> Cost:
    """Count a network's parameters, and its multiply-accumulates on the first image of `example_input`.

    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4))
    Cost(parameters=10, macs=8)
    """
    constants = {name: tensor.detach() for name, tensor in model.named_parameters()}
    with modes_kept(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()
        functional_call(model, constants, (example_input[:1],))  # the counter trips over a parameter that is an input
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
