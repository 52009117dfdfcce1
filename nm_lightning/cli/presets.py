"""What the paper used for each network and data set; a flag on the command line always wins."""

from collections.abc import Callable
from dataclasses import dataclass

from nm_lightning.compression import select


def nearest(neurons: int, ratio: float) -> int:
    """Python's `round` of `n (1 - r)`."""
    return round(neurons * (1 - ratio))


def truncated(neurons: int, ratio: float) -> int:
    """`int` of the float product `n (1 - r)`."""
    return int(neurons * (1 - ratio))


def four_times_truncated(neurons: int, ratio: float) -> int:
    """WideResNet-40-4: truncated before the widening factor."""
    return 4 * int(neurons // 4 * (1 - ratio))


@dataclass(frozen=True)
class Preset:
    """Defaults of the flags for one network on one data set.

    Attributes:
        sites: glob patterns of the layers to compress; None for all.
        rounding: `(neurons, ratio)` to survivors.
        widths: survivors where no ratio is given.
        threshold: least cosine similarity of a merged pair.
        lamda: weight of the cosine distance against the bias distance.
    """

    sites: tuple[str, ...] | None = None
    rounding: Callable[[int, float], int] = select.floor
    widths: tuple[int, ...] | None = None
    threshold: float = 0.1
    lamda: float = 0.85


VGG16_CIFAR10 = (32, 64, 128, 128, *[256] * 9)
VGG16_CIFAR100 = (32, 64, 128, 128, 256, 256, 256, 512, 512, 256, 256, 256, 256)
ALEXNET = Preset(sites=("classifier.*",), rounding=nearest)

PRESETS = {
    ("lenet_300_100", "fashion_mnist"): Preset(rounding=nearest, threshold=0.45),
    ("vgg16", "cifar10"): Preset(sites=("feature.*",), widths=VGG16_CIFAR10),
    ("vgg16", "cifar100"): Preset(sites=("feature.*",), widths=VGG16_CIFAR100, lamda=0.7),
    ("resnet56", "cifar10"): Preset(rounding=truncated),
    ("wide_resnet_40_4", "cifar10"): Preset(sites=("block*.layer.*.conv1",), rounding=four_times_truncated, lamda=0.8),
    ("alexnet", "cifar100"): ALEXNET,
    ("alexnet", "imagenet"): ALEXNET,
    ("torchvision/alexnet", "imagenet"): ALEXNET,
}


def preset(model: str, data: str) -> Preset:
    """The paper's settings for a network on a data set, or the general defaults."""
    return PRESETS.get((model, data), Preset())
