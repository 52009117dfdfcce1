"""The columns of a consumer's weight: taking neurons in, writing, adding, silencing. In place, on copies."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.sites import Consumer, Site


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


def silence(tensors: Mapping[str, Tensor], consumer: Consumer, stays: Tensor) -> None:
    """Zero the columns that a consumer no longer reads, in place; `tensors` are the network's by name."""
    name, dim = consumer.slots[0]
    weight = tensors[name].movedim(dim, 1)
    for part, own in zip(weight.chunk(consumer.groups), stays.chunk(consumer.groups), strict=True):
        part[:, ~own.to(weight.device)] = 0


def silence_rows(tensors: Mapping[str, Tensor], site: Site, keep: Tensor) -> None:
    """Zero the queries whose neurons are not among the survivors `(k,)`, in place: their products say nothing then."""
    for pair in site.pairs:
        if pair.dim == 0:
            for tensor in (tensors[name] for name in rows_of(pair.maker, tensors)):
                tensor[pair.gone(keep).to(tensor.device)] = 0


def rows_of(layer: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of a Linear layer's weight, and of its bias if it has one."""
    return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in tensors]


def add_columns(weight: Tensor, stays: Tensor, change: Tensor, groups: int) -> None:
    """Add `(out, taps * kept)` to the columns of a weight `(out, columns, ...)` that stay, in place."""
    taps = weight[0, 0].numel()
    change = change.view(len(weight), taps, -1).transpose(1, 2)  # (out, kept, taps)
    parts = zip(weight.chunk(groups), stays.chunk(groups), change.chunk(groups), strict=True)
    for part, own, block in parts:
        part[:, own] += block.reshape(*block.shape[:2], *weight.shape[2:])


def add_constant(layer: nn.Module, norm: nn.Module | None, shift: Tensor) -> None:
    """Add `(out,)` to a layer's output: in its bias, else in its norm's mean, else in a bias that is made for it."""
    if layer.bias is not None:
        layer.bias += shift
    elif norm is not None:
        norm.running_mean -= shift
    else:
        layer.bias = nn.Parameter(shift.clone(), requires_grad=layer.weight.requires_grad)
