"""WideResNet-d-k (Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.models.registry import register

STAGE_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Pre-activation block: norm-ReLU-conv twice; the shortcut is the raw input, or a 1x1 conv of the rectified one.

    Args:
        in_channels: channels of the input.
        hidden: channels of the first convolution, the ones that compression removes.
        out_channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        rectified = F.relu(self.bn1(features))
        shortcut = features if self.convShortcut is None else self.convShortcut(rectified)
        return self.conv2(F.relu(self.bn2(self.conv1(rectified)))) + shortcut


class Group(nn.Module):
    """The blocks of one stage, under the name `layer` that published checkpoints use."""

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> Tensor:
        """Run the blocks one after the other."""
        return self.layer(features)


@register(
    r"wide_resnet_(\d+)_(\d+)",
    "wide_resnet_{6n+4}_{k} (wide_resnet_40_4)",
    lambda depth, widen: (depth - 4) // 2 if depth >= 10 and depth % 6 == 4 and widen >= 1 else None,
)
class WideResNet(nn.Module):
    """Three stages of `(depth - 4) / 6` blocks, `widen` times as wide as ResNet's.

    Args:
        depth: 6n+4.
        widen: the widening factor k.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: channels of each block's first convolution, in order.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int,
        input_shape: tuple[int, int, int],
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        blocks = (depth - 4) // 6
        hidden = iter(widths or [w * widen for w in STAGE_WIDTHS for _ in range(blocks)])
        channels = STAGE_WIDTHS[0]
        self.conv1 = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        for stage, width in enumerate(STAGE_WIDTHS, start=1):
            group = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                group.append(Block(channels, next(hidden), width * widen, stride))
                channels = width * widen
            setattr(self, f"block{stage}", Group(group))
        self.bn1 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(F.relu(self.bn1(features))).flatten(1))
