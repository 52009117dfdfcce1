"""Fourth room: the only code that changes a network.

`absorb` gives a consumer its columns on the kept neurons, and `apply_plan` slices every tensor to the survivors. The
plan is plain lists and numbers: it repeats the slicing on any network of the same, wide architecture.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nm_lightning.compression.sites import Consumer, Site
from nm_lightning.errors import InputError

# {"slices": {tensor: [[dimension, groups, positions that stay], ...]}, "attributes": {"layer.attribute": length}},
# and "biases": {layer: length before slicing} where a layer got one that it had not
Plan = dict[str, dict[str, Any]]


def absorb(weight: Tensor, positions: Tensor, scaling: Tensor, keep: Tensor | None = None, groups: int = 1) -> Tensor:
    """A consumer's weight on the kept neurons: `W_next <- W_next Z` (Kim et al. 2020, algorithm 1).

    Args:
        weight: `(out, columns, ...)`; the columns of one group where there are several.
        positions: `(n, s)`, the columns that each neuron owns, counted over all groups; s is 1 if there are several.
        scaling: `Z`, `(n, k)`, zero between neurons of different groups.
        keep: `(k,)`, the survivors; needed where there are groups.
        groups: of a grouped convolution.

    Returns:
        `(out, k, s, ...)`, or `(out, k / groups, 1, ...)`, in the weight's dtype, computed in float32 or wider.

    >>> absorb(torch.tensor([[1.0, 10.0]]), torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.5]]))
    tensor([[[6.]]])
    """
    wide = torch.promote_types(weight.dtype, scaling.dtype)
    scaling = scaling.to(wide)
    if groups == 1:
        absorbed = torch.tensordot(weight[:, positions].to(wide), scaling, dims=([1], [0]))
        return absorbed.movedim(-1, 1).to(weight.dtype)
    order, kept_order = positions[:, 0].argsort(), positions[keep, 0].argsort()
    blocks = scaling[order][:, kept_order]
    per, kept = len(order) // groups, scaling.shape[1] // groups
    blocks = blocks.view(groups, per, groups, kept).diagonal(dim1=0, dim2=2)  # (per, kept, groups)
    split = weight.to(wide).view(groups, -1, per, *weight.shape[2:])
    absorbed = torch.einsum("goi...,ikg->gok...", split, blocks)
    return absorbed.reshape(weight.shape[0], kept, 1, *weight.shape[2:]).to(weight.dtype)


def put(weight: Tensor, positions: Tensor, keep: Tensor, block: Tensor, groups: int = 1) -> None:
    """Write the kept neurons' new columns `block`, as `absorb` returns them, in place, at the positions they own."""
    if groups == 1:
        weight[:, positions[keep].flatten()] = block.flatten(1, 2)
        return
    per = weight.shape[1]
    columns = positions[keep, 0].sort().values.view(groups, -1) % per  # (groups, kept)
    split = weight.view(groups, -1, *weight.shape[1:])
    for group, stays in enumerate(columns):
        split[group][:, stays] = block.view(groups, -1, *block.shape[1:])[group].flatten(1, 2)


@dataclass
class Fold:
    """Fills a consumer's columns on the kept neurons with what merging makes of all of them.

    Attributes:
        consumer: the layer that reads the neurons.
        keep: `(k,)`, the survivors.
        scaling: `Z`, `(n, k)`.
        multiply: `absorb`, or the reference's.
    """

    consumer: Consumer
    keep: Tensor
    scaling: Tensor
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]

    @property
    def dim(self) -> int:
        """The weight's dimension of columns."""
        return self.consumer.slots[0][1]

    def __call__(self, weight: Tensor) -> None:
        """Write into the weight, whose rows may be sliced already, its columns not."""
        columns = weight.movedim(self.dim, 1)
        positions, keep, scaling = (
            tensor.to(weight.device) for tensor in (self.consumer.positions(), self.keep, self.scaling)
        )
        groups = self.consumer.groups
        if groups == 1:
            put(columns, positions, keep, self.multiply(columns, positions, scaling))
        else:
            put(columns, positions, keep, absorb(columns, positions, scaling, keep, groups), groups)


def plan_sites(sites: Sequence[Site], keeps: Mapping[str, Tensor]) -> Plan:
    """What the survivors `(k,)` of each site mean for the tensors and attributes of its layers."""
    masks: dict[tuple[str, int, int], Tensor] = {}
    axes: dict[str, tuple[Tensor, int]] = {}
    shrinking = [site for site in sites if len(keeps[site.name]) < site.width]
    parts = [(site, [*site.producers, *site.passed]) for site in shrinking]
    for site, members in parts + [(site, site.consumers) for site in shrinking]:  # columns last: fewer rows to fold
        for member in members:
            keep = keeps[site.name]
            stays = torch.isin(member.owner, keep) | (member.owner < 0)
            for tensor, dim in member.slots:
                before = masks.get((tensor, dim, member.groups))
                masks[tensor, dim, member.groups] = stays if before is None else before & stays
            for attribute, divisor in member.counts.items():
                path = f"{member.name}.{attribute}".removeprefix(".")
                before, _ = axes.get(path, (stays, divisor))
                axes[path] = before & stays, divisor
    slices = defaultdict(list)
    for (tensor, dim, groups), stays in masks.items():
        slices[tensor].append([dim, groups, stays.nonzero().flatten().tolist()])
    return {
        "slices": dict(slices),
        "attributes": {name: int(stays.sum()) // divisor for name, (stays, divisor) in axes.items()},
    }


def apply_plan(model: nn.Module, plan: Plan, folds: Mapping[str, Sequence[Fold]] | None = None) -> nn.Module:
    """Slice a wide network to the plan's survivors, in place; returns the same network.

    Args:
        model: the network; its tensors are replaced, not written to.
        plan: what stays.
        folds: by weight, what fills its surviving columns before the others go.

    Raises:
        InputError: the network lacks a tensor of the plan, or has it too short.
    """
    for name, length in plan.get("biases", {}).items():
        layer = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(length), requires_grad=layer.weight.requires_grad)
    homes: dict[int, list[tuple[dict, str]]] = defaultdict(list)  # where each tensor hangs, the shared ones too
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for attribute, tensor in tensors.items():
                if tensor is not None:
                    homes[id(tensor)].append((tensors, attribute))
    tensors = named_tensors(model)
    for name, steps in plan.get("slices", {}).items():
        if name not in tensors:
            raise InputError(f"the compressed checkpoint was made from another network: no tensor {name!r}")
        tensor = narrow = tensors[name]
        for dim, groups, stays in steps:
            for fold in (folds or {}).get(name, ()):
                if fold.dim == dim:
                    narrow = narrow.detach().clone() if narrow is tensor else narrow
                    fold(narrow)
            narrow = _slice(name, narrow.detach(), dim, groups, stays)
        if isinstance(tensor, nn.Parameter):
            narrow = nn.Parameter(narrow, requires_grad=tensor.requires_grad)
        for home, attribute in homes[id(tensor)]:
            home[attribute] = narrow
    for path, length in plan.get("attributes", {}).items():
        layer, _, attribute = path.rpartition(".")
        module = model.get_submodule(layer)
        before = getattr(module, attribute)
        setattr(module, attribute, type(before)([length]) if isinstance(before, (tuple, list)) else length)
    return model


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


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
