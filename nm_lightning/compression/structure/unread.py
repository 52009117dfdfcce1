"""Parameters that `forward` does not read: heads of other methods, layers of the training step, copies that average.

No graph sees them, so they keep their widths; a site that they may hang on does, too.
"""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nm_lightning.compression.structure.copies import evaluated, without_data
from nm_lightning.compression.structure.inputs import Inputs, call, like
from nm_lightning.compression.structure.operations import CONVOLUTIONS, TRANSPOSED
from nm_lightning.compression.structure.plan import Plan, apply_plan, named_tensors
from nm_lightning.compression.structure.sites import Site, Trace

AVERAGES = re.compile("ema|averag|momentum|shadow", re.IGNORECASE)  # how copies that follow the weights are called


class Reads(TorchFunctionMode):
    """Notes which tensors are read by whatever runs within; to ask one for its shape is not to read it."""

    def __init__(self):
        super().__init__()
        self.tensors: dict[int, Tensor] = {}  # kept, so that no other takes its number

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call, and note."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__" or isinstance(result, Tensor):
            leaves = pytree.tree_leaves((args, kwargs))
            self.tensors |= {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        return result

    def names(self, model: nn.Module) -> set[str]:
        """The parameters of a network among them."""
        return {name for name, own in model.named_parameters(remove_duplicate=False) if id(own) in self.tensors}


@dataclass
class Unread:
    """What `forward` does not read.

    Attributes:
        parameters: by name.
        copies: parts that follow others of the same layers, as a moving average does, and these: narrowed together.
        whole: sites that keep their neurons, with the reason.
    """

    parameters: list[str]
    copies: dict[str, str]
    whole: dict[str, str]

    @property
    def skipped(self) -> dict[str, str]:
        """Layers, and the network's own parameters, with the reason why they stay as they are."""
        found = {part: f"a copy of {of}, narrowed with it" for part, of in self.copies.items()}
        rest = (name for name in self.parameters if not _within(name, self.copies))
        return found | {name.rpartition(".")[0] or name: "forward does not read it: left as it is" for name in rest}


def unread(model: nn.Module, example: Inputs, found: Trace, whole: Mapping[str, str] | None = None) -> Unread:
    """What `forward`, as the network is evaluated, does not read.

    Args:
        model: the network, its weights plain tensors.
        example: a batch that it accepts.
        found: its sites; what has a share in them is known.
        whole: the sites that stay whole for it, where these are known; else they are found by their widths.
    """
    members = [part for site in found.sites for part in (*site.producers, *site.passed, *site.consumers)]
    known = {member.name for member in members} | set(found.skipped)
    slots = {tensor for member in members for tensor, _ in member.slots}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def without(names: Sequence[str], met: Set[str]) -> list[str]:
        return [name for name in names if not ({name, name.rpartition(".")[0] or name} & met)]

    parameters = without(names, known | slots)
    if parameters:
        read = _read(model, example)
        parameters = without(parameters, read | {name.rpartition(".")[0] for name in read if "." in name})
    copies = copies_of(model, parameters)
    return Unread(parameters, copies, dict(hanging(model, parameters, copies, found.sites) if whole is None else whole))


def _read(model: nn.Module, example: Inputs) -> set[str]:
    """The parameters that an evaluation reads; all, where it can't be told."""
    for copy_of in (without_data, evaluated):
        try:
            network = copy_of(model).eval()
            inputs = like(example, network)
            with torch.no_grad(), Reads() as reads:
                call(network, inputs)
            return reads.names(network)
        except Exception:  # whatever the user's forward raises; the next copy has data
            continue
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def copies_of(model: nn.Module, parameters: Sequence[str]) -> dict[str, str]:
    """Parts all unread that are called averages, and the parts of the very same layers that they are of."""
    if not parameters:
        return {}
    spare, shapes = set(parameters), {name: tuple(own.shape) for name, own in named_tensors(model).items()}
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def inside(part: str) -> dict[str, tuple]:
        start = f"{part}." if part else ""
        return {name.removeprefix(start): shape for name, shape in shapes.items() if name.startswith(start)}

    found: dict[str, str] = {}
    parts = [name for name, _ in model.named_modules() if name]
    for part in parts:
        own = inside(part)
        names = {f"{part}.{name}" for name in own} & learned
        if not names or not names <= spare or _within(part, found):
            continue
        averaged = any(
            isinstance(model.get_submodule(parent), torch.optim.swa_utils.AveragedModel) or AVERAGES.search(parent)
            for parent in (part, part.rpartition(".")[0])
            if parent
        )
        of = next((o for o in parts if averaged and not _within(o, [part]) and not _within(part, [o])
                   and inside(o) == own and not ({f"{o}.{name}" for name in own} & spare)), None)  # fmt: skip
        if of is not None:
            found[part] = of
    return found


def hanging(
    model: nn.Module, parameters: Sequence[str], copies: Mapping[str, str], sites: Sequence[Site]
) -> dict[str, str]:
    """The sites that unread layers may read, by their widths; a width that an earlier unread layer makes is its own."""
    found: dict[str, str] = {}
    made: set[int] = set()
    tensors = named_tensors(model)
    for name in parameters:
        tensor, layer = tensors[name], name.rpartition(".")[0]
        if _within(name, copies) or not tensor.ndim or _on_another_branch(model, layer):
            continue
        wanted, makes = _widths(model.get_submodule(layer), tensor)
        for site in sites:
            lengths = {site.width, *(len(consumer.owner) for consumer in site.consumers)}
            width = next(iter(lengths & (wanted - made)), None)
            if width is not None:
                what = f"{layer or name}, which forward does not read, may read"
                found.setdefault(site.name, f"{what} its {width} neurons: it stays whole")
        made |= makes
    return found


def _on_another_branch(model: nn.Module, layer: str) -> bool:
    """Whether the code of `forward` names a layer, which it does not call as it is called here."""
    parent, _, attribute = layer.rpartition(".")
    forward = model.get_submodule(parent).forward
    return bool(attribute) and attribute in getattr(getattr(forward, "__code__", None), "co_names", ())


def _widths(layer: nn.Module, tensor: Tensor) -> tuple[set[int], set[int]]:
    """How many channels a parameter may read, and how many its layer makes."""
    if tensor.ndim > 1 and isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        dim = int(not isinstance(layer, TRANSPOSED))
        groups = getattr(layer, "groups", 1)
        return {tensor.shape[dim] * (groups if dim else 1)}, {tensor.shape[1 - dim]}
    if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        return set(), set()
    return {length for length in tensor.shape if length > 1}, set()


def follow(model: nn.Module, plan: Plan, copies: Mapping[str, str]) -> Plan:
    """Narrow the copies in a network as what they are of, give them its values, in place; returns the whole plan."""
    if not copies:
        return plan
    tensors = named_tensors(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    slices = {id(tensors[name]): steps for name, steps in plan.get("slices", {}).items()}  # it may have other names
    more: Plan = {"slices": {}, "attributes": {}, "biases": {}}
    for twin, of in copies.items():
        for name, tensor in tensors.items():
            if _within(name, [of]) and id(tensor) in slices:
                more["slices"][f"{twin}{name.removeprefix(of)}"] = slices[id(tensor)]
        for name, module in modules.items():
            if _within(name, [of]):
                here = f"{twin}{name.removeprefix(of)}"
                for path, length in plan.get("attributes", {}).items():
                    layer, _, attribute = path.rpartition(".")
                    while layer not in modules:  # settings that a module has
                        layer, _, holder = layer.rpartition(".")
                        attribute = f"{holder}.{attribute}"
                    if modules[layer] is module:
                        more["attributes"][f"{here}.{attribute}"] = length
                for layer, length in plan.get("biases", {}).items():
                    if modules[layer] is module:
                        more["biases"][here] = length
    apply_plan(model, more)
    twins = named_tensors(model)
    with torch.no_grad():
        for twin, of in copies.items():
            for name, tensor in tensors.items():
                if _within(name, [of]):
                    twins[f"{twin}{name.removeprefix(of)}"].copy_(tensor)
    return {part: plan.get(part, {}) | entries for part, entries in more.items() if entries or part in plan}


def _within(name: str, parts: Any) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
