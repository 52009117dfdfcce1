"""Unlabelled images for whatever looks at activations, and the one rule by which ranks share them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_lightning.batches import inputs_and_labels, read
from nm_lightning.compression.settings import whole
from nm_lightning.compression.statistics.matched import are_photos, can_match, made
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.synthetic import SYNTHETIC, Synthetic
from nm_lightning.compression.structure.copies import evaluated
from nm_lightning.compression.structure.inputs import (
    Inputs,
    clone,
    first,
    joined,
    length,
    shapes,
    split,
    taken_from,
    tensors_in,
    zipped,
)
from nm_lightning.errors import InputError

BATCH_BYTES = 6 << 20  # of one batch of images: ten photos; never more than 128


def check_size(size: int, ranks: Ranks = ALONE) -> None:
    """Raise `InputError` unless `size` is a number of images, and enough of them to give each rank one."""
    whole(1).check("calibration_size", size)
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


class Calibration:
    """Images in batches as the network reads them, gathered when they are first asked for.

    Args:
        source: inputs like the example; batches of them, as a DataLoader gives them, see `inputs_and_labels`;
            `synthetic`, or `Synthetic` where the range of the inputs is known, see `made`; or None for none.
        example: a batch that the network accepts; its shape and device are the images', its dtype in at least float32.
        size: how many images at most.
        seed: of the synthetic images.
        ranks: that each have a share of the images; synthetic ones are shared out here.
        model: to whose norms, as it is evaluated, synthetic images are matched; None to leave them as they start.
        steps: of Adam on each synthetic image.

    Attributes:
        remarks: what a reader of the result should know of the images.
    """

    def __init__(
        self,
        source: Inputs | Iterable | Synthetic | str | None,
        example: Inputs,
        size: int = 1024,
        seed: int = 0,
        ranks: Ranks = ALONE,
        model: nn.Module | None = None,
        steps: int = 0,
    ):
        self.source = Synthetic() if isinstance(source, str) and source == SYNTHETIC else source
        self.example, self.size, self.seed, self.ranks = example, size, seed, ranks
        self.model, self.steps, self.remarks = model, steps, []

    def check(self, recipe: Any) -> None:
        """Raise `InputError` where a `Recipe` asks for images that there are not."""
        if recipe.looks and self.source is None:
            raise InputError(
                f"{recipe.looks} looks at images: give calibration, a tensor, a DataLoader or {SYNTHETIC!r}"
            )

    @property
    def synthetic(self) -> bool:
        """Whether nobody took its images."""
        return isinstance(self.source, Synthetic)

    @property
    def telling(self) -> bool:
        """Whether predictions on them say something: those on images that a program draws and matches to nothing don't.

        LeNet-300-100 at 0.7, independent pixels: `output` seems 3.7 times nearer to the original than `l2-norm`, and is
        five points worse.
        """
        return not self.synthetic or can_match(self.model, self.steps)

    @property
    def drawn(self) -> bool:
        """Whether a program draws its images, and does not cut them out of photographs."""
        return self.synthetic and not are_photos(self.example.shape[1:])

    @property
    def gathered(self) -> bool:
        """Whether there are images in memory."""
        return "batches" in vars(self)

    @cached_property
    def batches(self) -> list[Inputs]:
        """This rank's images in batches.

        Raises:
            InputError: no images, or images of another shape.
        """
        check_size(self.size, self.ranks)
        images = self._images()
        zipped(_check, images, self.example)
        leader = tensors_in(images)[0]
        # the caller's stay as they are
        return split(clone(zipped(_as, images, self.example)), batch_length(leader.shape[1:], leader.element_size()))

    def _images(self) -> Inputs:
        source, example = self.source, self.example
        if isinstance(source, Synthetic):
            if not isinstance(example, Tensor) or example.ndim != 4 or not example.is_floating_point():
                raise InputError(f"synthetic images are (N, C, H, W), the network reads {shapes(example)}")
            drawn = None
            if self.ranks.rank == 0:
                model = None if self.model is None else evaluated(self.model)
                drawn = made(source, model, example, self.size, self.seed, self.steps)
            images, remark = self.ranks.first(drawn)
            self.remarks += [remark] if remark else []
            return source.inputs(share(images, batch_length(images.shape[1:]), self.ranks))
        if isinstance(source, str):
            raise InputError(f"calibration {source!r}: give a tensor, a DataLoader or {SYNTHETIC!r}")
        several = isinstance(source, tuple) and isinstance(example, tuple) and isinstance(source[0], Tensor)
        if isinstance(source, (Tensor, Mapping)) or several:
            return first(self.taken(source), self.size)
        if not isinstance(source, Iterable):
            raise InputError(f"calibration is of type {type(source).__name__}: give a tensor or a DataLoader")
        size = -(-self.size // self.ranks.size)  # of this rank's loader
        parts, count = [], 0
        for batch in read(source):
            parts.append(self.taken(batch))
            count += length(parts[-1])
            if count >= size:
                break
        return first(joined(parts), size) if parts else first(example, 0)

    def taken(self, batch: Any) -> Inputs:
        """The network's inputs in a batch of a loader."""
        single = isinstance(self.example, Tensor)
        found = inputs_and_labels(batch)[0] if single else taken_from(batch, self.example)
        leaves = [pytree.tree_flatten(each) for each in (self.example, found)]
        kinds = [[isinstance(leaf, Tensor) for leaf in flat] for flat, _ in leaves]
        if leaves[0][1] != leaves[1][1] or kinds[0] != kinds[1]:
            raise InputError(f"calibration gives a {type(batch).__name__}: give batches that are tensors")
        return found


def _check(images: Tensor, example: Tensor) -> Tensor:
    if not images.ndim or not len(images):
        raise InputError("calibration has no images")
    if images.shape[1:] != example.shape[1:]:
        raise InputError(
            f"calibration images are {tuple(images.shape[1:])}, the network reads {tuple(example.shape[1:])}"
        )
    if not bool(images.isfinite().all()):
        raise InputError("calibration images hold values that are not finite")
    return images


def _as(images: Tensor, example: Tensor) -> Tensor:
    low = example.dtype in (torch.float16, torch.bfloat16)
    return images.to(example.device, torch.float32 if low else example.dtype)
