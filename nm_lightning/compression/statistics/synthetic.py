"""Images that a program draws, for calibration without data."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
