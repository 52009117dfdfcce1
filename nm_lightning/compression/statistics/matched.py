"""Synthetic images moved until a network's BatchNorms see the statistics that they remember of its training data.

After Yin et al., "Dreaming to Distill" (CVPR 2020) and Cai et al., "ZeroQ" (CVPR 2020), but that images start from
pictures and take a few steps.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.adapted import moments
from nm_lightning.compression.statistics.runs import channels_last, recorded
from nm_lightning.compression.statistics.stored import stored
from nm_lightning.compression.statistics.synthetic import Synthetic, crops, dead_leaves, noise
from nm_lightning.compression.structure.copies import duplicate
from nm_lightning.compression.structure.operations import BATCH_NORMS, CONVOLUTIONS
from nm_lightning.progress import progress

RATE = 0.00625  # of Adam, as a share of the input's range; it falls to zero along a cosine
PHOTO = 64  # pixels: smaller images are better made of dead leaves than of crops, though these are nearer to the norms
BATCH_BYTES = 6 << 20  # of one batch of images


def made(
    asked: Synthetic, model: nn.Module | None, example: Tensor, size: int, seed: int, steps: int
) -> tuple[Tensor, str]:
    """Synthetic images, moved towards the statistics that a network's BatchNorms remember.

    They start from `crops`, or from `dead_leaves` where images are small; their mirror images are as many again. They
    are kept in a folder for the next time, see `stored`. Without BatchNorms there is nothing to match: `dead_leaves`
    then, and `noise` where no convolution looks for shapes.

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
    if not can_match(model, steps):
        why = "" if model is None or not steps else "synthetic images are as drawn: no BatchNorm says what to match"
        spatial = model is None or any(isinstance(module, CONVOLUTIONS) for module in model.modules())
        return to_bytes((dead_leaves if spatial else noise)(size, shape, seed)), why
    key = hashlib.sha256(repr(("matched", 3, asked, shape, size, seed, steps)).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            key.update(name.encode())
            key.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def make() -> Tensor:
        starts = (crops if are_photos(shape) else dead_leaves)(-(-size // 2), shape, seed)
        moved = match(model, asked, starts.to(example.device), steps)
        return to_bytes(torch.cat([moved, moved.flip(-1)])[:size].cpu())

    return stored(key.hexdigest(), make), ""


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of floats in [0, 1]."""
    return images.mul(255).round().byte()


def are_photos(shape: Sequence[int]) -> bool:
    """Whether images `(C, H, W)` are made of crops of photographs."""
    return shape[0] in (1, 3) and min(shape[1:]) >= PHOTO


def can_match(model: nn.Module | None, steps: int) -> bool:
    """Whether there are BatchNorms, and steps, to match images with."""
    return model is not None and steps > 0 and bool(norms_of(model))


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The BatchNorms that remember statistics."""
    return [norm for norm in model.modules() if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None]


class Norms:
    """What the BatchNorms of a network remember, and how far images are from it.

    Args:
        model: in evaluation mode; a copy that shares its tensors is looked into.
    """

    def __init__(self, model: nn.Module):
        self.model, self.found = duplicate(model), []
        self.norms = norms_of(self.model)
        self.dtype = self.norms[0].running_mean.dtype
        for norm in self.norms:
            norm.register_forward_pre_hook(self._look)

    def _look(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.found.append((norm, moments(args[0], norm.running_mean)))

    def moments(self, inputs: Tensor) -> list[Tensor]:
        """At each call of a norm, `(2, C)`: sums over images of means, and of squares, around the remembered mean."""
        self.found.clear()
        self.model(inputs.to(self.dtype))
        return [len(inputs) * moments for _, moments in self.found]

    def distance(self, moments: Sequence[Tensor], count: int) -> Tensor:
        """Squared distance of the means in units of the variance, plus a quarter of that of the variances' logarithms.

        Near zero both are the Kullback-Leibler divergence of two normal distributions, times two. The mean over
        channels, then over norms, `()`.

        Args:
            moments: of the last call of `moments`, or their sum over several.
            count: images that they were taken of.
        """
        distances = []
        for (norm, _), both in zip(self.found, moments, strict=True):
            shift, square = both / count
            remembered = norm.running_var + norm.eps
            spread = ((square - shift.square()).clamp_min(0) + norm.eps).log() - remembered.log()
            distances.append((shift.square() / remembered + spread.square() / 4).mean())
        return torch.stack(distances).mean()


def match(model: nn.Module, asked: Synthetic, images: Tensor, steps: int) -> Tensor:
    """Move images `(N, C, H, W)` in [0, 1] by steps of Adam until all of them together are like the training data.

    A step moves one batch; the others count with the moments that they had when their turn was. Matched by itself,
    each batch would lose its variety: that costs a ResNet-20 three points. Every other step sees the images mirrored.
    """
    _, (few,) = recorded(model, [asked.inputs(images[:3])])
    like = channels_last if few.is_contiguous(memory_format=torch.channels_last) else torch.clone
    norms, batches = Norms(model), [like(batch).clone().requires_grad_() for batch in in_batches(images)]
    optimisers = [torch.optim.Adam([batch]) for batch in batches]
    known: dict[int, list[Tensor]] = {}
    work = [(step, turn) for step in range(steps) for turn in range(len(batches))]
    with torch.inference_mode(False), torch.enable_grad():
        for step, turn in progress(work, "matching synthetic images"):
            batch, optimiser = batches[turn], optimisers[turn]
            known[turn] = norms.moments(asked.inputs(batch.flip(-1) if step % 2 else batch))
            count = sum(len(batches[each]) for each in known)
            loss = norms.distance([sum(each) for each in zip(*known.values(), strict=True)], count)
            (batch.grad,) = torch.autograd.grad(loss, batch)
            known[turn] = [moments.detach() for moments in known[turn]]
            optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            optimiser.step()
            with torch.no_grad():
                batch.clamp_(0, 1)
    return torch.cat(batches).detach()


def in_batches(images: Tensor) -> Sequence[Tensor]:
    """About equal parts of at most 128 images, or ten photos."""
    length = max(2, min(128, BATCH_BYTES // (images[0].numel() * 4)))
    return images.tensor_split(-(-len(images) // length))
