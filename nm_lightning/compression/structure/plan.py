"""The plan: which positions of every tensor stay. It repeats a compression's slicing on any wide network.

It is plain lists and numbers, so that it travels in a checkpoint.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.parts import modules_of, parts_of
from nm_lightning.compression.structure.sites import Site
from nm_lightning.compression.structure.wrappers import unwrap_inside
from nm_lightning.errors import InputError

# {"slices": {tensor: [[dimension, groups, positions that stay], ...]}, "attributes": {"layer.attribute": length}},
# and "biases": {layer: length before slicing} where a layer got one that it had not
Plan = dict[str, dict[str, Any]]


def plan_sites(sites: Sequence[Site], keeps: Mapping[str, Tensor]) -> Plan:
    """What the survivors `(k,)` of each site mean for the tensors and attributes of its layers."""
    masks: dict[tuple[str, int, int], Tensor] = {}
    axes: dict[tuple[str, str], tuple[Tensor, int]] = {}  # by attribute and the node where it counts neurons
    shrinking = [site for site in sites if len(keeps[site.name]) < site.width]
    parts = [(site, [*site.producers, *site.passed]) for site in shrinking]
    for site, members in parts + [(site, site.consumers) for site in shrinking]:  # columns last: fewer rows to fold
        for member in members:
            stays = member.stays(keeps[site.name])
            for tensor, dim in member.slots:
                before = masks.get((tensor, dim, member.groups))
                masks[tensor, dim, member.groups] = stays if before is None else before & stays
            for attribute, divisor in member.counts.items():
                axis = f"{member.name}.{attribute}".removeprefix("."), member.node
                before, _ = axes.get(axis, (stays, divisor))
                axes[axis] = before & stays, divisor
    slices = defaultdict(list)
    for (tensor, dim, groups), stays in masks.items():
        slices[tensor].append([dim, groups, stays.nonzero().flatten().tolist()])
    return {
        "slices": dict(slices),
        "attributes": {name: int(stays.sum()) // divisor for (name, _), (stays, divisor) in axes.items()},
    }


def apply_plan(
    model: nn.Module, plan: Plan, before: Callable[[str, int, Tensor], Tensor] = lambda name, dim, tensor: tensor
) -> nn.Module:
    """Slice a wide network to the plan's survivors, in place; returns the same network.

    Args:
        model: the network; its tensors are replaced, not written to.
        plan: what stays.
        before: what a tensor becomes before its dimension is sliced, by its name.

    Raises:
        InputError: the network lacks a tensor of the plan, or has it too short.
    """
    unwrap_inside(model)
    for name, length in plan.get("biases", {}).items():
        layer = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(length), requires_grad=layer.weight.requires_grad)
    tensors, changed = named_tensors(model), {}
    for name in plan.get("slices", {}):
        if name not in tensors:
            raise InputError(f"the compressed checkpoint was made from another network: no tensor {name!r}")
        changed[name] = sliced(name, tensors[name].detach(), plan, before)
    replace_tensors(model, changed)
    for path, length in plan.get("attributes", {}).items():
        layer, _, attribute = path.rpartition(".")
        attribute, _, place = attribute.partition("[")
        home = _holder(model, layer)
        before = getattr(home, attribute)
        if isinstance(before, (tuple, list)):
            place = int(place.rstrip("]") or 0)
            length = type(before)([*before[:place], length, *before[place + 1 :]])
        setattr(home, attribute, length)
    for held in caches(model):
        held.clear()
    return model._apply(lambda tensor: tensor)  # as when a network moves: what modules computed before is forgotten


def _holder(model: nn.Module, path: str) -> Any:
    """What has an attribute: a module, or its settings, of which it gets a copy of its own."""
    parts, home = path.split(".") if path else [], model
    for part in parts:
        held = getattr(home, part)
        if not isinstance(held, nn.Module):
            held = copy.copy(held)
            setattr(home, part, held)
        home = held
    return home


def caches(model: nn.Module) -> list[dict]:
    """The dictionaries that modules call caches: what they keep was computed from the tensors of then."""
    held = (item for module in modules_of(model) for item in vars(module).items())
    return [value for name, value in held if isinstance(value, dict) and value and "cache" in name.lower()]


def sliced(
    name: str,
    tensor: Tensor,
    plan: Plan,
    before: Callable[[str, int, Tensor], Tensor] = lambda name, dim, tensor: tensor,
) -> Tensor:
    """What stays of a tensor that is shaped like the one of that name, such as its momentum; see `apply_plan`."""
    for dim, groups, stays in plan.get("slices", {}).get(name, []):
        tensor = _slice(name, before(name, dim, tensor), dim, groups, stays)
    return tensor


def replace_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put other tensors in the place of a network's, wherever these hang; parameters stay parameters."""
    tensors = named_tensors(model)
    homes: dict[int, list[tuple[dict, str]]] = defaultdict(list)  # the shared ones have several
    for module in modules_of(model):
        for held, attribute, tensor in tensors_of(module):
            homes[id(tensor)].append((held, attribute))
    for name, value in values.items():
        old = tensors[name]
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for home, attribute in homes[id(old)]:
            home[attribute] = value


def tensors_of(module: nn.Module) -> list[tuple[dict, str, Tensor]]:
    """A module's own parameters, buffers and plain tensor attributes, each with the dictionary that holds it."""
    return [(home, name, value) for home in _homes(module) for name, value in home.items() if isinstance(value, Tensor)]


def _homes(module: nn.Module) -> tuple[dict, dict, dict]:
    return module._parameters, module._buffers, vars(module)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and plain tensor attributes by every name they have."""
    kinds: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for prefix, module in parts_of(model):
        start = f"{prefix}." if prefix else ""
        for kind, home in zip(kinds, _homes(module), strict=True):
            kind |= {start + name: value for name, value in home.items() if isinstance(value, Tensor)}
    return kinds[0] | kinds[1] | kinds[2]


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have: a plain attribute may be an activation that a forward keeps."""
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, module in parts_of(model)
        for home, name, tensor in tensors_of(module)
        if home is not vars(module)
    }


def compose(first: Plan, second: Plan) -> Plan:
    """The plan that does `first`, then `second`."""
    slices = {name: list(steps) for name, steps in first.get("slices", {}).items()}
    for name, steps in second.get("slices", {}).items():
        slices[name] = slices.get(name, []) + steps
    merged = {part: first.get(part, {}) | second.get(part, {}) for part in ("attributes", "biases")}
    return {part: entries for part, entries in {"slices": slices, **merged}.items() if entries}


def prefixed(plan: Plan, prefix: str) -> Plan:
    """The plan as a network sees it that holds the planned one under the name `prefix`."""
    return {part: {f"{prefix}.{name}": value for name, value in entries.items()} for part, entries in plan.items()}


def _slice(name: str, tensor: Tensor, dim: int, groups: int, stays: list[int]) -> Tensor:
    """The positions that stay along `dim`; with groups they count over all groups, each of which keeps its own."""
    length = tensor.shape[dim] * groups if dim < tensor.ndim else 0
    if stays and max(stays) >= length:
        raise InputError(
            f"the compressed checkpoint was made from another network: {name} has a length of {length} "
            f"in dimension {dim}, the plan needs more than {max(stays)}"
        )
    index = torch.tensor(stays, device=tensor.device)
    if groups == 1:
        return tensor.index_select(dim, index)
    columns = (index % tensor.shape[1]).view(groups, -1)
    split = tensor.view(groups, -1, *tensor.shape[1:])
    return torch.cat([part.index_select(1, own) for part, own in zip(split, columns, strict=True)])
