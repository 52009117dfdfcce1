"""What a layer multiplies its weight with, and least squares on it."""

import copy
import itertools

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.operations import CONVOLUTIONS


def as_columns(weight: Tensor, groups: int) -> Tensor:
    """A weight `(out, columns, ...)` in the order of `read_patches`: `(groups, taps * columns, out / groups)`."""
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)


def read_patches(layer: nn.Module, images: Tensor, stays: Tensor, groups: int = 1) -> Tensor:
    """What a layer multiplies its weight with: `(groups, positions, taps * kept + 1)`, the last column one.

    Args:
        layer: a Linear or convolution, or a subclass whose forward is linear in its weight.
        images: its input.
        stays: `(columns,)`, the columns, counted over all groups, that are read.
        groups: of the convolution.
    """
    if isinstance(layer, nn.Linear):
        images = images if bool(stays.all()) else images[..., stays]
        parts = [images if type(layer) is nn.Linear else _probe(layer, images, torch.eye(images.shape[-1]))]
    else:
        images = images if bool(stays.all()) else images[:, stays]
        parts = _taps(layer, images)
    ones = parts[0].new_ones(()).expand(*parts[0].shape[:-1], groups, 1)
    parts = [part.unflatten(-1, (groups, -1)) for part in parts]
    return torch.cat([*parts, ones], dim=-1).flatten(0, -3).transpose(0, 1)


def correlate(layer: nn.Module, images: Tensor, gap: Tensor, stays: Tensor) -> Tensor:
    """The patches' transpose times a tensor like the layer's output: `(groups, taps * kept + 1, out / groups)`.

    It is what autograd gives for the weight, and takes no longer than the layer itself. Nothing else of a gradient is
    used here: the layer is linear in its weight.
    """
    groups, dim = getattr(layer, "groups", 1), 1 if isinstance(layer, CONVOLUTIONS) else gap.ndim - 1
    narrow = torch.cat(
        [part[:, own] for part, own in zip(layer.weight.chunk(groups), stays.chunk(groups), strict=True)]
    )
    images = images if bool(stays.all()) else images.movedim(dim, -1)[..., stays].movedim(-1, dim)
    probe = copy.copy(layer)
    with torch.enable_grad():
        weight = narrow.detach().requires_grad_()
        probe._parameters = {**layer._parameters, "weight": weight, "bias": None}
        (found,) = torch.autograd.grad(probe.forward(images.detach()), weight, gap)
    found = as_columns(found, groups)
    constant = gap.sum(dim=[other for other in range(gap.ndim) if other != dim])
    return torch.cat([found, constant.view(groups, 1, -1)], dim=1)


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
    taps = layer.weight[0, 0].numel()
    eye = torch.eye(taps, dtype=images.dtype, device=images.device).view(taps, 1, *layer.weight.shape[2:])
    sizes = {"in_channels": 1, "out_channels": taps, "groups": 1}
    each = _probe(layer, images.flatten(0, 1).unsqueeze(1), eye, **sizes)  # (N * channels, taps, ...)
    each = each.unflatten(0, images.shape[:2]).movedim(1, -1)  # (N, taps, ..., channels)
    return list(each.unbind(1))


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
