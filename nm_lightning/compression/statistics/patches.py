"""What a layer multiplies its weight with, at some positions or all, and least squares on it."""

import copy
import itertools
import math

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.operations import CONVOLUTIONS

ENOUGH = 200  # positions for each unknown of a layer's least squares; further ones are not looked at
BLOCK = 192  # columns of a Gram matrix that are worth a product of their own


def as_columns(weight: Tensor, groups: int) -> Tensor:
    """A weight `(out, columns, ...)` in the order of `read_patches`: `(groups, taps * columns, out / groups)`."""
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)


def places_of(layer: nn.Module, output: torch.Size) -> int:
    """At how many positions of an image a layer with outputs of this shape multiplies its weight."""
    return math.prod(output[2:] if isinstance(layer, CONVOLUTIONS) else output[1:-1])


def draw_rows(images: int, places: int, each: int, seed: int = 0) -> Tensor | None:
    """Positions of a batch `(images * each,)`, as rows of `read_patches`, equally many of each image; None for all.

    Each image has its own, drawn by seed; no position of an image comes twice.

    >>> draw_rows(2, 100, 3).tolist() != draw_rows(2, 100, 3, seed=1).tolist()
    True
    >>> draw_rows(2, 100, 100)
    """
    if each >= places:
        return None
    order = torch.randperm(places, generator=torch.Generator().manual_seed(seed))
    image = torch.arange(images)[:, None]
    return (order[(image * each + torch.arange(each)) % places] + image * places).flatten()


def at_rows(output: Tensor, rows: Tensor | None, dim: int) -> Tensor:
    """A tensor like a layer's output as `(rows, channels)`; `dim` is the channels' dimension."""
    last = output.movedim(dim, -1)
    if rows is None:
        return last.flatten(0, -2)
    return last[torch.unravel_index(rows.to(output.device), last.shape[:-1])]


def read_patches(
    layer: nn.Module, images: Tensor, stays: Tensor, groups: int = 1, rows: Tensor | None = None
) -> Tensor:
    """What a layer multiplies its weight with: `(groups, positions, taps * kept + 1)`, the last column one.

    Args:
        layer: a Linear or convolution, or a subclass whose forward is linear in its weight.
        images: its input.
        stays: `(columns,)`, the columns, counted over all groups, that are read.
        groups: of the convolution.
        rows: the positions to read, counted over all images; None for all.
    """
    whole = bool(stays.all())
    table = tap_table(layer, images) if rows is not None and isinstance(layer, CONVOLUTIONS) else None
    if rows is not None and type(layer) is nn.Linear:
        images, rows = at_rows(images, rows, -1), None
    if table is not None:
        patches = gather(images, table, rows.to(images.device))
        patches = (patches if whole else patches[..., stays]).unflatten(-1, (groups, -1)).transpose(1, 2)
        parts, rows = [patches.flatten(2)], None
    else:
        if isinstance(layer, nn.Linear):
            images = images if whole else images[..., stays]
            parts = [images if type(layer) is nn.Linear else _probe(layer, images, torch.eye(images.shape[-1]))]
        else:
            images = images if whole else images[:, stays]
            parts = _taps(layer, images)
        parts = [part.unflatten(-1, (groups, -1)) for part in parts]
    ones = parts[0].new_ones(()).expand(*parts[0].shape[:-1], 1)
    patches = torch.cat([*parts, ones], dim=-1).flatten(0, -3).transpose(0, 1)
    return patches if rows is None else patches[:, rows.to(patches.device)]


def tap_table(layer: nn.Module, images: Tensor) -> Tensor | None:
    """Which of an image's entries lie under a convolution's taps: `(positions, taps)`, flat, -1 for zeros beside it.

    The layer itself says so: it is shown the entries' numbers, one tap at a time. None where it does more to a
    subclass' input than to look at it.
    """
    space = images.shape[2:]
    taps, entries = layer.weight[0, 0].numel(), math.prod(space)
    numbers = torch.arange(1, entries + 1, device=images.device, dtype=torch.float64)
    drawn = torch.rand(entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(images.device)
    try:
        shown = _each_tap(layer, torch.stack([numbers, drawn]).view(2, 1, *space))
    except RuntimeError:  # an operation that has no float64
        return None
    numbers, seen = shown.flatten(2).transpose(1, 2)  # (positions, taps)
    table = numbers.round().long() - 1
    if taps != table.shape[1] or int(table.min()) < -1 or int(table.max()) >= entries:
        return None
    same = torch.where(table < 0, 0.0, drawn[table.clamp(min=0)])
    return table if torch.allclose(seen, same, rtol=0, atol=1e-9) else None


def gather(images: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The entries `(rows, taps, channels)` that a `tap_table` finds in images `(N, channels, ...)`."""
    last = images.movedim(1, -1).flatten(1, -2)  # (N, entries, channels), a view where the channels are last in memory
    image, place = rows // len(table), rows % len(table)
    under = table[place]
    found = last.flatten(0, 1).index_select(0, (image[:, None] * last.shape[1] + under.clamp(min=0)).flatten())
    found = found.view(*under.shape, -1)
    found[under < 0] = 0
    return found


def gram_of(patches: Tensor) -> Tensor:
    """`(groups, p, p)` of patches `(groups, positions, p)`: their products with each other, in float64.

    The products are summed in the patches' dtype; of what is symmetric, one half is computed.
    """
    width = patches.shape[-1]
    gram = patches.new_empty(len(patches), width, width, dtype=torch.float64)
    for start in range(0, width, BLOCK):
        own = slice(start, start + BLOCK)
        block = patches[..., own].transpose(1, 2) @ patches[..., start:]
        gram[:, own, start:] = block
        gram[:, start:, own] = block.transpose(1, 2)
    return gram


def _taps(layer: nn.Module, images: Tensor) -> list[Tensor]:
    """For each position of a convolution's kernel, the input as it lies under it: `(N, ..., channels)`, last."""
    if type(layer).__module__.startswith("torch.nn."):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = nn.functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
        images = images.movedim(1, -1).contiguous()
        spans = []
        settings = zip(images.shape[1:-1], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        for size, kernel, stride, dilation in settings:
            reach = (size - dilation * (kernel - 1) - 1) // stride * stride + 1
            spans.append([slice(tap * dilation, tap * dilation + reach, stride) for tap in range(kernel)])
        return [images[(slice(None), *span)] for span in itertools.product(*spans)]
    each = _each_tap(layer, images.flatten(0, 1).unsqueeze(1))  # (N * channels, taps, ...)
    each = each.unflatten(0, images.shape[:2]).movedim(1, -1)  # (N, taps, ..., channels)
    return list(each.unbind(1))


def _each_tap(layer: nn.Module, images: Tensor) -> Tensor:
    """A convolution's output `(N, taps, ...)` for images of one channel, with a one at each tap in turn as weight."""
    taps = layer.weight[0, 0].numel()
    eye = torch.eye(taps, dtype=images.dtype, device=images.device).view(taps, 1, *layer.weight.shape[2:])
    return _probe(layer, images, eye, in_channels=1, out_channels=taps, groups=1)


def _probe(layer: nn.Module, images: Tensor, weight: Tensor, **sizes: int) -> Tensor:
    """What a forward of the user's own, such as another padding, does to a given weight; its hooks are not called."""
    probe = copy.copy(layer)
    probe._parameters = {**layer._parameters, "weight": weight.to(images), "bias": None}
    for name, size in sizes.items():
        setattr(probe, name, size)
    return probe.forward(images)


def factorise(gram: Tensor, penalty: Tensor) -> Tensor:
    """Cholesky factors of `(groups, p, p)` plus a diagonal `(p,)`, which grows where a matrix is singular."""
    floor = gram.diagonal(dim1=1, dim2=2).mean() * 1e-12 + torch.finfo(gram.dtype).tiny
    for power in range(16):
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag(penalty + floor * 10.0**power))
        if not info.any():
            return factor
    raise ArithmeticError("calibration statistics are not finite")


def ridge_of(gram: Tensor, ridge: float) -> Tensor:
    """What is added to the diagonal `(p,)`: a share of its mean; nothing to the constant's, the last."""
    penalty = (ridge * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean()).expand(gram.shape[1]).clone()
    penalty[-1] = 0
    return penalty
