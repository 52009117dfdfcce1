"""Unlabelled images for the methods that look at activations: the user's own, or drawn by a program."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression.follow import BATCH_NORMS
from nm_lightning.compression.prepare import modes_kept
from nm_lightning.compression.ranks import ALONE, Ranks
from nm_lightning.errors import InputError

SYNTHETIC = "synthetic"
BATCH_BYTES = 6 << 20  # of one batch of images: ten photos; never more than 128


def check_size(size: int, ranks: Ranks = ALONE) -> None:
    """Raise `InputError` unless `size` is a number of images, and enough of them to give each rank one."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"calibration_size {size!r}: give a whole number from 1")
    if size < ranks.size:
        raise InputError(f"calibration_size {size} leaves some of {ranks.size} ranks without an image: give more")


def batch_length(shape: Sequence[int], bytes_each: int = 4) -> int:
    """How many images of a shape make a batch."""
    return max(1, min(128, BATCH_BYTES // (math.prod(shape) * bytes_each)))


def share(images: Tensor, length: int, ranks: Ranks = ALONE) -> Tensor:
    """This rank's part of images, or of their indices: whole batches in turn, or equal parts where they are too few.

    One process sees the same batches, so the sums over all ranks are its own but for their order.
    """
    batches = images.split(length)
    if len(batches) < ranks.size:
        return images.tensor_split(ranks.size)[ranks.rank]
    return torch.cat(batches[ranks.rank :: ranks.size])


def batches_of(
    calibration: Tensor | Iterable | str, example: Tensor, size: int = 1024, seed: int = 0, ranks: Ranks = ALONE
) -> list[Tensor]:
    """The calibration images in batches as the network reads them.

    Args:
        calibration: images `(N, ...)`; batches of them, alone or first in a tuple, as a DataLoader gives them; or
            `synthetic` for `dead_leaves`.
        example: a batch that the network accepts; its shape and device are the images', its dtype in at least float32.
        size: how many images at most.
        seed: of the synthetic images.
        ranks: that each have a share of the images; synthetic ones are shared out here.

    Raises:
        InputError: no images, or images of another shape.
    """
    check_size(size, ranks)
    if isinstance(calibration, str):
        if calibration != SYNTHETIC:
            raise InputError(f"calibration {calibration!r}: give a tensor, a DataLoader or {SYNTHETIC!r}")
        if example.ndim != 4 or not example.is_floating_point():
            raise InputError(f"synthetic images are (N, C, H, W), the network reads {tuple(example.shape)}")
        images = dead_leaves(size, tuple(example.shape[1:]), seed) * 4 - 2  # about a normalised image's range
        images = share(images, batch_length(images.shape[1:]), ranks)
    elif isinstance(calibration, Tensor):
        images = calibration[:size]
    elif not isinstance(calibration, Iterable):
        raise InputError(f"calibration is of type {type(calibration).__name__}: give a tensor or a DataLoader")
    else:
        size = -(-size // ranks.size)  # of this rank's loader
        parts, count = [], 0
        for batch in calibration:
            part = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            if not isinstance(part, Tensor):
                raise InputError(f"calibration gives a {type(part).__name__}: give batches that are tensors")
            parts.append(part)
            count += len(part)
            if count >= size:
                break
        images = torch.cat(parts)[:size] if parts else example[:0]
    if not images.ndim or not len(images):
        raise InputError("calibration has no images")
    if images.shape[1:] != example.shape[1:]:
        raise InputError(
            f"calibration images are {tuple(images.shape[1:])}, the network reads {tuple(example.shape[1:])}"
        )
    if not bool(images.isfinite().all()):
        raise InputError("calibration images hold values that are not finite")
    length = batch_length(images.shape[1:], images.element_size())
    low = example.dtype in (torch.float16, torch.bfloat16)
    images = images.to(example.device, torch.float32 if low else example.dtype)
    images = images.clone()  # the caller's stay as they are
    return list(images.split(length))


def dead_leaves(count: int, shape: tuple[int, int, int], seed: int = 0, leaves: int = 40) -> Tensor:
    """Images that a program draws: overlapping discs and rectangles ("dead leaves", Lee et al., IJCV 2001).

    Their sizes are log-uniform, their colours flat with a slight gradient; edges, occlusion and the range of scales
    are those of photographs, which is all that least squares needs to find a network's redundancy.

    Args:
        count: number of images.
        shape: `(channels, height, width)`.
        seed: the same images for the same seed.
        leaves: shapes on each image.

    Returns:
        `(count, channels, height, width)`, float32 in [0, 1].

    >>> dead_leaves(2, (3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    def colours() -> Tensor:
        grey, tint = uniform(count, 1), uniform(count, channels)
        return 0.65 * grey + 0.35 * tint  # a photograph's channels are correlated

    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    images = colours()[:, :, None, None].expand(count, *shape).clone()
    small, large = 1.5, 0.45 * max(height, width)
    for _ in range(leaves):
        y, x = uniform(count, 1, 1) * height, uniform(count, 1, 1) * width
        half = small * (large / small) ** uniform(count, 1, 1)
        aspect = 2.0 ** uniform(count, 1, 1, low=-1, high=1)
        angle = uniform(count, 1, 1, high=torch.pi)
        along = ((columns - x) * angle.cos() + (rows - y) * angle.sin()) / (half * aspect)
        across = ((rows - y) * angle.cos() - (columns - x) * angle.sin()) / (half / aspect)
        round_ = uniform(count, 1, 1) < 0.5
        inside = torch.where(round_, along.square() + across.square() < 1, (along.abs() < 1) & (across.abs() < 1))
        slope = uniform(count, channels, 1, 1, low=-0.15, high=0.15)
        leaf = colours()[:, :, None, None] + slope * along.clamp(-1, 1)[:, None]
        images = torch.where(inside[:, None], leaf, images)
    kernel = torch.tensor([1.0, 6.0, 1.0]) / 8  # a slight blur
    kernel = (kernel[:, None] * kernel).expand(channels, 1, 3, 3)
    images = F.conv2d(F.pad(images, [1] * 4, mode="replicate"), kernel, groups=channels)
    noise = torch.randn(images.shape, generator=generator) * 0.02
    return (images + noise).clamp(0, 1)


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Tensor], ranks: Ranks = ALONE) -> None:
    """Estimate the running statistics of all BatchNorms anew on all ranks' images, in place."""
    batches = list(batches)
    (short,) = ranks.total(batches[0].new_tensor(sum(map(len, batches)) < 2, dtype=torch.int64))
    if short:
        raise InputError("recalibrate_norm: one image has no variance; give more calibration images")
    if any(len(batch) == 1 for batch in batches):
        batches = list(torch.cat(batches).split(2))
        batches[-2:] = [torch.cat(batches[-2:])] if len(batches[-1]) == 1 else batches[-2:]
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    momenta = [(norm, norm.momentum) for norm in norms]
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over all batches
        for batch in batches:
            model(batch.clone())
    count = norms[0].running_mean.new_tensor(len(batches)) if norms else None
    for norm, momentum in momenta:
        norm.momentum = momentum
        if ranks.size > 1:
            every, mean, var = ranks.total(count, norm.running_mean * count, norm.running_var * count)
            norm.running_mean.copy_(mean / every)
            norm.running_var.copy_(var / every)
