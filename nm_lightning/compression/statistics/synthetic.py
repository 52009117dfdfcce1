"""Images that nobody took of the data: a program draws them, or cuts them out of two photographs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Synthetic:
    """Asks for synthetic images where a network's inputs are known to lie in a range; about a normalised one else.

    Attributes:
        low: the least that a network reads, for each channel or for all.
        high: the most.
    """

    low: tuple[float, ...] = (-2.0,)
    high: tuple[float, ...] = (2.0,)

    def inputs(self, images: Tensor) -> Tensor:
        """What a network reads of images `(N, C, H, W)`: uint8, or floats in [0, 1]."""
        low, high = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.low, self.high))
        share = images / 255 if images.dtype == torch.uint8 else images
        return low + (high - low) * share


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


def crops(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Crops of the two photographs that come with scikit-learn, 2 to 60 % of their area; mirrored, their colours moved.

    Args:
        count: number of images.
        shape: `(channels, height, width)`; one channel or three.
        seed: the same images for the same seed.

    Returns:
        `(count, channels, height, width)`, float32 in [0, 1].

    >>> crops(2, (3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(each.copy()).permute(2, 0, 1) / 255 for each in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    images = torch.empty(count, 3, *shape[1:])
    for number, image in enumerate(images):
        whole = photographs[number % len(photographs)]
        height, width = whole.shape[1:]
        area, aspect = height * width * uniform(0.02, 0.6), 2.0 ** uniform(-0.5, 0.5)
        rows, columns = min(height, int((area * aspect) ** 0.5)), min(width, int((area / aspect) ** 0.5))
        y, x = int(uniform(0, height - rows + 1)), int(uniform(0, width - columns + 1))
        crop = whole[None, :, y : y + rows, x : x + columns]
        crop = F.interpolate(crop, shape[1:], mode="bilinear", align_corners=False, antialias=True)[0]
        crop = crop.flip(-1) if uniform(0, 1) < 0.5 else crop
        contrast, brightness = uniform(0.7, 1.3), uniform(-0.15, 0.15)
        tint = 0.85 + 0.3 * torch.rand(3, 1, 1, generator=generator)
        image.copy_(((crop - crop.mean()) * contrast + crop.mean() + brightness) * tint)
    return images.clamp(0, 1) if shape[0] == 3 else images.clamp(0, 1).mean(1, keepdim=True)


def noise(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Pixels that know nothing of each other: normal, mean 0.3 and standard deviation 0.35, cut off at 0 and 1.

    Fully connected layers are solved better on these than on pictures whose correlations are not the data's.

    Returns:
        `(count, channels, height, width)`, float32 in [0, 1].

    >>> noise(2, (1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    return (0.3 + 0.35 * torch.randn(count, *shape, generator=generator)).clamp(0, 1)
