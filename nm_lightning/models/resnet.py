"""CIFAR ResNet of depth 6n+2, in the form that neuron merging's authors published (ResNet-56).

After He et al., "Deep residual learning for image recognition", CVPR 2016, with the ReLU moved from
behind the addition to the block's input.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.models.registry import register

STAGE_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """ReLU, conv-norm-ReLU-conv-norm, plus the shortcut of the rectified input; no ReLU after the sum.

    Args:
        in_channels: channels of the input.
        hidden: channels of the first convolution, the ones that compression removes.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        features = F.relu(features)
        shortcut = features if self.downsample is None else self.downsample(features)
        hidden = F.relu(self.bn1(self.conv1(features)))
        return self.bn2(self.conv2(hidden)) + shortcut


@register(
    r"resnet(\d+)", "resnet{6n+2} (resnet56)", lambda depth: (depth - 2) // 2 if depth >= 8 and depth % 6 == 2 else None
)
class ResNet(nn.Module):
    """Three stages of `(depth - 2) / 6` blocks.

    Args:
        depth: 6n+2.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: channels of each block's first convolution, in order.
    """

    def __init__(
        self, depth: int, num_classes: int, input_shape: tuple[int, int, int], widths: Sequence[int] | None = None
    ):
        super().__init__()
        blocks = (depth - 2) // 6
        hidden = iter(widths or [w for w in STAGE_WIDTHS for _ in range(blocks)])
        channels = STAGE_WIDTHS[0]
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, out_channels in enumerate(STAGE_WIDTHS, start=1):
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                layer.append(Block(channels, next(hidden), out_channels, stride))
                channels = out_channels
            setattr(self, f"layer{stage}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        features = self.bn1(self.conv1(images))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.avgpool(F.relu(features)).flatten(1))
