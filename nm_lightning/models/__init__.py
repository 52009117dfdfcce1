"""Architectures as plain `nn.Module`s, and the one registry of their names.

| name | network | `widths` |
| --- | --- | --- |
| `lenet_300_100` | LeNet-300-100 | 2 hidden layers |
| `vgg11`, `vgg13`, `vgg16`, `vgg19` | VGG with batch norm, CIFAR form | each convolution, then the hidden Linear |
| `resnet{6n+2}`, such as `resnet56` | CIFAR ResNet | each block's first convolution |
| `wide_resnet_{6n+4}_{k}`, such as `wide_resnet_40_4` | WideResNet | each block's first convolution |
| `alexnet` | AlexNet, CIFAR or ImageNet form by the image's size | 5 convolutions, 2 hidden Linears |
| `torchvision/<name>` | torchvision's own classifier | none |
"""

import re
from collections.abc import Callable, Sequence

from torch import nn

from nm_lightning.errors import InputError
from nm_lightning.models import alexnet, lenet, resnet, torchvision_zoo, vgg, wide_resnet

NAMES = (
    "lenet_300_100, vgg11, vgg13, vgg16, vgg19, resnet{6n+2} (resnet56), "
    "wide_resnet_{6n+4}_{k} (wide_resnet_40_4), alexnet, torchvision/<name>"
)


def build_model(
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    widths: Sequence[int] | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Build a network by its registered name.

    Args:
        name: one of `NAMES`.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: neurons of each hidden layer in order (the table above); None for the architecture's own.
        weights: torchvision's pretrained weights (`DEFAULT`, `IMAGENET1K_V1`, ...); only for `torchvision/<name>`.

    Returns:
        The network, freshly initialised unless `weights` is given.

    Raises:
        InputError: unknown name, a wrong number of widths, or weights where there are none.

    >>> build_model("lenet_300_100", num_classes=10, input_shape=(1, 28, 28), widths=(150, 50)).ip2
    Linear(in_features=150, out_features=50, bias=True)
    """
    if name.startswith("torchvision/"):
        if widths is not None:
            raise InputError(f"{name} takes no widths: build it whole, then compress it")
        return torchvision_zoo.build(name.removeprefix("torchvision/"), num_classes, input_shape, weights)
    if weights is not None:
        raise InputError(f"weights {weights!r}: only torchvision/<name> has pretrained weights, {name} has none")

    builder, hidden_layers = _find(name)
    shape = tuple(input_shape)
    if widths is None:
        return builder(num_classes=num_classes, input_shape=shape)
    if len(widths) != hidden_layers or any(width < 1 for width in widths):
        raise InputError(f"widths {list(widths)}: {name} takes {hidden_layers} positive integers")
    return builder(num_classes=num_classes, input_shape=shape, widths=tuple(widths))


def _find(name: str) -> tuple[Callable[..., nn.Module], int]:
    """The builder of one of our own architectures, and how many hidden widths it takes."""
    if name == "lenet_300_100":
        return lenet.LeNet, 2
    if name == "alexnet":
        return alexnet.AlexNet, 7
    if (match := re.fullmatch(r"vgg(\d+)", name)) and (depth := int(match[1])) in vgg.STAGES:
        return lambda **kwargs: vgg.VGG(depth, **kwargs), sum(vgg.STAGES[depth]) + 1
    if (match := re.fullmatch(r"resnet(\d+)", name)) and (depth := int(match[1])) >= 8 and depth % 6 == 2:
        return lambda **kwargs: resnet.ResNet(depth, **kwargs), (depth - 2) // 2
    if match := re.fullmatch(r"wide_resnet_(\d+)_(\d+)", name):
        depth, widen = int(match[1]), int(match[2])
        if depth >= 10 and depth % 6 == 4 and widen >= 1:
            return lambda **kwargs: wide_resnet.WideResNet(depth, widen, **kwargs), (depth - 4) // 2
    raise InputError(f"unknown model {name!r}: choose from {NAMES}")
