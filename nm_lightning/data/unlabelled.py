"""Images without labels, for the methods that look at activations."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from nm_lightning.errors import InputError
from nm_lightning.progress import progress


def open_image(path: str) -> Image.Image:
    """Decode a file as RGB.

    Raises:
        InputError: it is no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} can't be read as an image ({reason}): replace or remove it") from error


def draw(count: int, size: int, seed: int) -> Tensor:
    """So many of `count` indices, in an order drawn by seed.

    >>> draw(3, 5, seed=0).sort().values
    tensor([0, 1, 2])
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size]


def sample_folder(folder: Path, pick: Callable[[int], Tensor], transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Some of the images in a folder and all folders in it, `(N, C, H, W)`.

    Args:
        folder: where they are.
        pick: `count` to the indices that are wanted of so many files, sorted by path.
        transform: what makes an image of a file.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"calibration {str(folder)!r} is no folder: name one with images, or data, or synthetic")
    files = sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not files:
        raise InputError(f"calibration folder {str(folder)!r} has no images")
    picked = progress(pick(len(files)).tolist(), "calibration images")
    return torch.stack([transform(open_image(files[index])) for index in picked])
