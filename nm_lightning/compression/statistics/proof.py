"""Every result proves itself: before weights are solved, the narrow network must say what the masked wide one says.

The graph knows shapes, not values: code that looks at the size or the place of channels while it runs may fit, and yet
say something else. So both networks are run on a few inputs and compared layer by layer, so that nothing hides behind
a bias. Where they don't agree to rounding, the sites that are to blame are found by bisection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph.frames import TORCH
from nm_lightning.compression.graph.tracer import graph_of, leaves_of
from nm_lightning.compression.statistics.runs import channels_that_stay, narrow_norms
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.columns import rows_of, silence, silence_rows
from nm_lightning.compression.structure.copies import duplicate, evaluated, with_data
from nm_lightning.compression.structure.decomposition import Decomposition, narrow, roots_of
from nm_lightning.compression.structure.inputs import Inputs, call, clone, dtype_of, length, shapes, tensors_in, to
from nm_lightning.compression.structure.operations import SOLVABLE, TRANSPOSED
from nm_lightning.compression.structure.plan import Plan, named_tensors, replace_tensors
from nm_lightning.compression.structure.sites import Site
from nm_lightning.errors import InputError, first_line

CLOSE = 1e-5  # of a layer's scale: float32 rounds no worse in most networks; what differs by more is run in float64,
CLOSER = 1e-9  # where it must be this close
FALLBACK = 1e-3  # for networks that can't be run in float64
FEW = 2  # inputs are enough
OUTPUT = "the network's output"


@dataclass
class Proof:
    """What was compared.

    Attributes:
        inputs: how many.
        real: whether they are calibration images; else they were drawn.
        difference: the largest of any layer, as a share of its scale, with all sites that are not blamed.
        blamed: by site, why it stays whole.
        narrowed: the network that all sites narrow, and its plan, where none is blamed.
    """

    inputs: int = 0
    real: bool = False
    difference: float = 0.0
    blamed: dict[str, str] = field(default_factory=dict)
    narrowed: tuple[nn.Module, Plan] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """In a sentence."""
        if not self.inputs:
            return "nothing was removed"
        kind = "calibration images" if self.real else "drawn inputs"
        return (
            f"before weights were solved, the narrow network said what the masked wide one says: on {self.inputs} "
            f"{kind}, layer by layer, to {self.difference:.0e} of a layer's scale"
        )


@torch.no_grad()
def prove(subject: Subject, keeps: Mapping[str, Tensor]) -> Proof:
    """Compare the network narrowed to the survivors with the masked wide one; under ranks all get rank 0's verdict.

    Raises:
        InputError: the network does not accept the example.
    """
    shrinking = [site for site in subject.sites if len(keeps[site.name]) < site.width]
    if not shrinking:
        return Proof()
    narrowed = narrow(subject.model, shrinking, Decomposition.pruned(shrinking, keeps))
    for count in (FEW, length(subject.example)):
        inputs = subject.inputs(count)
        proof = Proof(length(inputs), subject.calibration.gathered)
        try:
            _, proof.difference = _agreeing(subject, shrinking, keeps, inputs, proof.blamed, narrowed[0])
            proof = subject.ranks.first(proof)
            proof.narrowed = None if proof.blamed else narrowed
            return proof
        except Refused as error:  # some networks want whole batches
            refusal = error
    name, given = type(subject.model).__name__, shapes(subject.example)
    raise InputError(f"{name} rejects an input of shape {given}: {refusal}") from refusal


class Refused(Exception):
    """The wide network does not accept an input."""


def _agreeing(
    subject: Subject,
    sites: Sequence[Site],
    keeps: Mapping[str, Tensor],
    inputs: Inputs,
    blamed: dict[str, str],
    narrowed: nn.Module | None = None,
) -> tuple[list[Site], float]:
    """The sites that can be narrowed together, and how far apart the networks are then; the others go to `blamed`."""
    apart, reason = difference(subject, sites, keeps, inputs, narrowed)
    if not reason:
        return list(sites), apart
    if len(sites) == 1:
        blamed[sites[0].name] = reason
        return [], 0.0
    half = len(sites) // 2
    first, apart = _agreeing(subject, sites[:half], keeps, inputs, blamed)
    second, other = _agreeing(subject, sites[half:], keeps, inputs, blamed)
    if not first or not second:
        return first + second, max(apart, other)
    together, reason = difference(subject, first + second, keeps, inputs)
    if not reason:
        return first + second, together
    for site in second:  # each is right alone, but not with the others
        together, reason = difference(subject, [*first, site], keeps, inputs)
        if reason:
            blamed[site.name] = reason
        else:
            first, apart = [*first, site], together
    return first, apart


def difference(
    subject: Subject,
    sites: Sequence[Site],
    keeps: Mapping[str, Tensor],
    inputs: Inputs,
    narrowed: nn.Module | None = None,
) -> tuple[float, str]:
    """How far the narrow network is from the masked wide one, as a share of a layer's scale, and what that means.

    The sentence is empty where they agree to rounding. A network that was `narrowed` at the sites is copied to run.
    """
    if narrowed is None:
        narrowed, _ = narrow(subject.model, sites, Decomposition.pruned(sites, keeps))
    small = _ready(duplicate(narrowed))
    layers = {name for name, layer in subject.layers.items() if isinstance(layer, (*SOLVABLE, *TRANSPOSED))}
    rows, roots = channels_that_stay(sites, keeps, layers), roots_of(sites, keeps, subject.layers)
    try:
        wide = _ready(masked(subject.model, sites, keeps, small, copied=False))
        apart, place = _apart(small, wide, inputs, rows, roots)
        close = CLOSER if dtype_of(inputs) == torch.float64 else CLOSE
        if apart > close:
            wide = _ready(masked(subject.model, sites, keeps, small))
            exact = _exactly(small, wide, inputs, rows, roots)
            apart, place, close = exact or (*_apart(small, wide, inputs, rows, roots), FALLBACK)
    except Refused:
        raise
    except Exception as error:  # whatever the user's forward raises where its numbers no longer fit
        return float("inf"), f"the narrow network fails: {first_line(error)}"
    if apart <= close:
        return apart, ""
    far = "has another shape" if apart == float("inf") else f"is {apart:.1e} of its scale off"
    graph = subject.once("graph", lambda: graph_of(subject.model, subject.example))
    code = " or ".join(lines_before(graph, place, subject.model)) or "code"
    return apart, f"narrowed, {place} {far} from what it is masked: does {code} read the number or place of neurons?"


def lines_before(graph: fx.Graph, place: str, model: nn.Module) -> list[str]:
    """Where the user's code computes what a layer says from what the layers before it said: at most three lines.

    Those that compute with sizes, where there are some.
    """
    layer = model.get_submodule("" if place == OUTPUT else place)
    own = type(layer).forward.__code__
    if place != OUTPUT and not own.co_filename.startswith(TORCH):  # a layer of the user's class, which is one node
        return [f"{Path(own.co_filename).name}, line {own.co_firstlineno}"]
    ahead = [node for node in graph.nodes if place == (OUTPUT if node.op == "output" else node.target)][-1:]
    seen: dict[fx.Node, None] = {}
    while ahead:
        for source in ahead.pop().all_input_nodes:
            known = source.op == "call_module" and isinstance(model.get_submodule(source.target), SOLVABLE)
            if source not in seen and not known:
                seen[source] = None
                ahead.append(source)
    lined = [node for node in seen if "line" in node.meta and node.op not in ("call_module", "placeholder")]
    sized = [node for node in lined if not all("shape" in each.meta for each in (node, *node.all_input_nodes))]
    return list(dict.fromkeys(node.meta["line"] for node in sized or lined))[:3]


def _exactly(
    small: nn.Module, wide: nn.Module, inputs: Inputs, rows: Mapping[str, Tensor], roots: Mapping[str, Tensor]
) -> tuple[float, str, float] | None:
    """The same in float64, and how close it must be; None where a forward has a dtype of its own."""
    try:
        exact = to(inputs, dtype=torch.float64)
        return (*_apart(*(with_data(each).double() for each in (small, wide)), exact, rows, roots), CLOSER)
    except Exception:
        return None


def masked(
    model: nn.Module, sites: Sequence[Site], keeps: Mapping[str, Tensor], small: nn.Module, copied: bool = True
) -> nn.Module:
    """A copy of the wide network whose consumers read nothing from the removed neurons.

    A normalisation that mixes channels is that of the narrow network `small`, over the survivors alone. Unless
    weights are `copied`, torch's own layers share theirs with the model and are handed inputs with zeros instead,
    which is the same where nothing but the layer reads its weight.
    """
    result = duplicate(model)
    tensors = named_tensors(result)
    read = [(each, each.stays(keeps[site.name])) for site in sites for each in site.consumers]
    layers = {each.name: result.get_submodule(each.name) for each, _ in read if each.called and not copied}
    handed = {name: layer for name, layer in layers.items() if type(layer) in SOLVABLE}  # no subclass, which may differ
    names = {each.slots[0][0] for each, _ in read if each.name not in handed}
    names |= {name for site in sites for pair in site.pairs for name in rows_of(pair.maker, tensors)}
    values = {name: tensors[name].detach().clone() for name in names}
    for consumer, stays in read:
        if consumer.name in handed:
            handed[consumer.name].register_forward_pre_hook(partial(_without, ~stays), with_kwargs=True)
        else:
            silence(values, consumer, stays)
    for site in sites:
        silence_rows(values, site, keeps[site.name])
    replace_tensors(result, values)
    norms = narrow_norms(model, sites, keeps, small)
    wide = {id(result.get_submodule(name)): norm for name, norm in norms.items()}
    for module in list(result.modules()):
        for name, child in module._modules.items():
            module._modules[name] = wide.get(id(child), child)
    return result


def _without(gone: Tensor, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments with zeros in the input's channels `(in,)` that are gone."""
    images, *others = args or kwargs.values()
    shape = [-1] + [1] * (layer.weight.ndim - 2)
    return (images.masked_fill(gone.to(images.device).view(shape), 0), *others), {}


def _ready(network: nn.Module) -> nn.Module:
    """A network of our own in evaluation mode, in at least float32."""
    low = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in named_tensors(network).values())
    return evaluated(network) if low else network.eval()


def said(model: nn.Module, inputs: Inputs, hear: Callable[[str, Tensor, int], None]) -> None:
    """Run a network, and tell what each of its layers says, and then it itself, each with the axis of its channels.

    Random numbers are always the same.
    """

    def tell(name: str, layer: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            hear(name, output.detach(), -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim)

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (*SOLVABLE, *TRANSPOSED))]
    handles = [layer.register_forward_hook(partial(tell, name)) for name, layer in layers]
    try:
        device = tensors_in(inputs)[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            given = call(model, clone(inputs))
    finally:
        for handle in handles:
            handle.remove()
    for leaf in leaves_of(given):
        if isinstance(leaf, Tensor):
            hear(OUTPUT, leaf, -1)


def _apart(
    small: nn.Module, wide: nn.Module, inputs: Inputs, rows: Mapping[str, Tensor], roots: Mapping[str, Tensor]
) -> tuple[float, str]:
    """The largest difference as a share of each tensor's scale, and where the first of that kind is.

    Infinite if shapes, calls or what is not finite differ. `rows` of the wide network's layers stay, `roots` are the
    narrow one's queries' factors.
    """
    wanted: list[tuple[str, Tensor]] = []

    def note(name: str, value: Tensor, axis: int) -> None:
        value = value * roots[name].to(value) if name in roots else value
        stays = rows.get(name)
        whole = stays is None or len(stays) != value.shape[axis]
        own = value.clone() if whole else value.index_select(axis, stays.nonzero().flatten().to(value.device))
        wanted.append((name, own))  # a copy: the value may be written into

    try:
        said(wide, inputs, note)
    except Exception as error:
        raise Refused(first_line(error)) from error
    ahead, worst, place = iter(wanted), 0.0, OUTPUT

    def compare(name: str, value: Tensor, axis: int) -> None:
        nonlocal worst, place
        other_name, other = next(ahead, ("", value))
        own = _gap(value, other) if name == other_name and value.shape == other.shape else float("inf")
        worst, place = max(worst, own), name if own > 10 * worst else place

    said(small, inputs, compare)
    return (worst, place) if next(ahead, None) is None else (float("inf"), OUTPUT)


def _gap(value: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the scale; infinite if other entries are not finite."""
    if not value.is_floating_point() or not value.numel():
        return 0.0
    gap, scale = _largest(value - other), _largest(other)
    if not (gap + scale).isfinite():
        finite = other.isfinite()
        if not torch.equal(finite, value.isfinite()):
            return float("inf")
        gap, scale = (_largest(each.masked_fill(~finite, 0)) for each in (value - other, other))
    return float(gap / scale.clamp(min=torch.finfo(value.dtype).tiny)) if gap > 0 else 0.0


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude."""
    least, most = values.aminmax()
    return torch.maximum(-least, most)
