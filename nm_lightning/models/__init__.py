"""Architectures as plain `nn.Module`s, and the registry of their names.

| name | network | `widths` |
| --- | --- | --- |
| `lenet_300_100` | LeNet-300-100 | 2 hidden layers |
| `vgg11`, `vgg13`, `vgg16`, `vgg19` | VGG with batch norm, CIFAR form | each convolution, then the hidden Linear |
| `resnet{6n+2}`, such as `resnet56` | CIFAR ResNet | each block's first convolution |
| `wide_resnet_{6n+4}_{k}`, such as `wide_resnet_40_4` | WideResNet | each block's first convolution |
| `alexnet` | AlexNet, CIFAR or ImageNet form by the image's size | 5 convolutions, 2 hidden Linears |
| `vit_{32 heads}_{depth}`, such as `vit_96_6` | ViT, patches of 4 or 16 pixels | each block's hidden layer |
| `torchvision/<name>` | torchvision's own classifier | none |
"""

from nm_lightning.models import lenet, vgg, resnet, wide_resnet, alexnet, vit, torchvision_zoo  # noqa: F401, I001 - as listed
from nm_lightning.models.registry import build_model, register, register_own

__all__ = ["build_model", "register", "register_own"]
