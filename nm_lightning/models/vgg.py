"""VGG with batch normalisation, in the form that neuron merging's authors trained on CIFAR.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from nm_lightning.errors import InputError
from nm_lightning.models.registry import register

# convolutions in each of the five stages, all of one width
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
STAGE_WIDTHS = (64, 128, 256, 512, 512)
HIDDEN = 512


@register(r"vgg(\d+)", "vgg11, vgg13, vgg16, vgg19", lambda depth: sum(STAGES[depth]) + 1 if depth in STAGES else None)
class VGG(nn.Module):
    """Conv-BatchNorm-ReLU triples with a pool after each stage (the last one averages), then two Linear layers.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image; height and width at least 32.
        widths: channels of every convolution in order, then neurons of the hidden Linear layer.
    """

    def __init__(
        self, depth: int, num_classes: int, input_shape: tuple[int, int, int], widths: Sequence[int] | None = None
    ):
        super().__init__()
        channels, height, width = input_shape
        if min(height, width) < 32:
            raise InputError(f"vgg{depth} halves the image five times: {height}x{width} is too small, use 32x32")
        stages = STAGES[depth]
        if widths is None:
            widths = [w for count, w in zip(stages, STAGE_WIDTHS, strict=True) for _ in range(count)] + [HIDDEN]
        *convolutions, hidden = widths

        layers: list[nn.Module] = []
        remaining = iter(convolutions)
        for stage, count in enumerate(stages):
            for _ in range(count):
                out_channels = next(remaining)
                layers += [
                    nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(2) if stage < 4 else nn.AvgPool2d(2))
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * (height // 32) * (width // 32), hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        return self.classifier(self.feature(images).flatten(1))
