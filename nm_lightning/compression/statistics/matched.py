"""Synthetic images moved until a network's BatchNorms see the statistics that they remember of its training data.

After Yin et al., "Dreaming to Distill" (CVPR 2020) and Cai et al., "ZeroQ" (CVPR 2020), but that images start from
pictures and take a few steps.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.stored import stored
from nm_lightning.compression.statistics.synthetic import Synthetic, crops, dead_leaves
from nm_lightning.compression.structure.copies import duplicate
from nm_lightning.compression.structure.operations import BATCH_NORMS
from nm_lightning.progress import progress

RATE = 0.05 / 4  # of Adam, as a share of the input's range; it falls to zero along a cosine
BATCH_BYTES = 16 << 20  # of one batch of images: 27 photos; never more than 128


def made(
    asked: Synthetic, model: nn.Module | None, example: Tensor, size: int, seed: int, steps: int
) -> tuple[Tensor, str]:
    """The synthetic images whose statistics are nearest to those of a network's BatchNorms, then moved towards them.

    Kept in a folder for the next time, see `stored`.

    Args:
        asked: the range of the inputs.
        model: in evaluation mode; it is only read. None for images that are not matched.
        example: an input `(N, C, H, W)`; its shape and device count.
        size: how many images.
        seed: of whatever is drawn.
        steps: of Adam on each image.

    Returns:
        uint8 `(size, C, H, W)` on the CPU, as images are; and what a reader should know, or nothing.
    """
    shape = tuple(example.shape[1:])
    if model is None or not steps or not norms_of(model):
        why = "" if model is None or not steps else "synthetic images are as drawn: no BatchNorm says what to match"
        return to_bytes(dead_leaves(size, shape, seed)), why
    key = hashlib.sha256(repr(("matched", 1, asked, shape, size, seed, steps)).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            key.update(name.encode())
            key.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def make() -> Tensor:
        kinds = [dead_leaves, crops] if shape[0] in (1, 3) else [dead_leaves]
        starts = [kind(size, shape, seed) for kind in kinds]
        nearest = min(starts, key=lambda images: distance(model, asked, images.to(example.device)))
        return to_bytes(match(model, asked, nearest.to(example.device), steps).cpu())

    return stored(key.hexdigest(), make), ""


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of floats in [0, 1]."""
    return images.mul(255).round().byte()


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The BatchNorms that remember statistics."""
    return [norm for norm in model.modules() if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None]


class Norms:
    """What the BatchNorms of a network remember, and how far a batch is from it.

    Args:
        model: in evaluation mode; a copy that shares its tensors is looked into.
    """

    def __init__(self, model: nn.Module):
        self.model = duplicate(model)
        self.found: list[Tensor] = []
        self.dtype = norms_of(model)[0].running_mean.dtype
        for norm in norms_of(self.model):
            norm.register_forward_pre_hook(self._look)

    def _look(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(args[0], [0, *range(2, args[0].ndim)], correction=0)
        remembered = norm.running_var + norm.eps
        shift = (mean - norm.running_mean).square() / remembered
        spread = ((variance + norm.eps).log() - remembered.log()).square() / 4
        self.found.append((shift + spread).mean())

    def distance(self, inputs: Tensor) -> Tensor:
        """Squared distance of the means in units of the variance, plus a quarter of that of the variances' logarithms.

        Both are about the Kullback-Leibler divergence of two normal distributions, times two; the mean over channels,
        then over norms, `()`.
        """
        self.found.clear()
        self.model(inputs.to(self.dtype))
        return torch.stack(self.found).mean()


@torch.no_grad()
def distance(model: nn.Module, asked: Synthetic, images: Tensor) -> float:
    """How far a batch of the images is from what the norms remember."""
    return Norms(model).distance(asked.inputs(images[: _length(images)])).item()


def match(model: nn.Module, asked: Synthetic, images: Tensor, steps: int) -> Tensor:
    """Move images `(N, C, H, W)` in [0, 1] by steps of Adam, batch by batch; every other step sees them mirrored."""
    norms, done = Norms(model), []
    batches: Sequence[Tensor] = images.tensor_split(-(-len(images) // _length(images)))
    work = progress([(batch, step) for batch in batches for step in range(steps)], "matching synthetic images")
    with torch.inference_mode(False), torch.enable_grad():
        for batch, step in work:
            if step == 0:
                moved = batch.clone().requires_grad_()
                optimiser = torch.optim.Adam([moved])
            optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            loss = norms.distance(asked.inputs(moved.flip(-1) if step % 2 else moved))
            (moved.grad,) = torch.autograd.grad(loss, moved)
            optimiser.step()
            with torch.no_grad():
                moved.clamp_(0, 1)
            if step == steps - 1:
                done.append(moved.detach())
    return torch.cat(done)


def _length(images: Tensor) -> int:
    return max(2, min(128, BATCH_BYTES // (images[0].numel() * 4)))
