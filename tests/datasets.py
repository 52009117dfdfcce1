"""Tiny data sets on disk, in the real ones' forms."""

import numpy as np
import torch
from PIL import Image


def write_images(folder, classes, each, size, seed=0, extension="png"):
    """Class folders of random images."""
    random = np.random.default_rng(seed)
    for index in range(classes):
        (folder / f"class{index:03d}").mkdir(parents=True)
        for image in range(each):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{index:03d}" / f"{image}.{extension}")


def write_colours(folder, counts, size=16):
    """Class folders of noise in which one channel is brighter, for each split as many images as `counts` says."""
    generator = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        for index in range(count):
            place = folder / split / f"class{index % 3}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 200, (size, size, 3), generator=generator)
            pixels[..., index % 3] += 25
            Image.fromarray(pixels.byte().numpy()).save(place / f"{index}.png")


def idx(values):
    """The bytes of MNIST's format."""
    header = np.array([0x800 + values.ndim, *values.shape], dtype=">i4")
    return header.tobytes() + values.astype(np.uint8).tobytes()
