"""AlexNet (Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014)."""

from collections.abc import Sequence

from torch import Tensor, nn

from nm_lightning.models.registry import register

WIDTHS = (64, 192, 384, 256, 256, 4096, 4096)


@register("alexnet", hidden=lambda: len(WIDTHS))
class AlexNet(nn.Module):
    """torchvision's AlexNet and its parameter names; images under 64 pixels get a 3x3 first convolution of stride 2.

    Args:
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: channels of the five convolutions, then neurons of the two hidden Linear layers.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], widths: Sequence[int] = WIDTHS):
        super().__init__()
        channels, *size = input_shape
        c1, c2, c3, c4, c5, h1, h2 = widths
        small = min(size) < 64
        first = nn.Conv2d(channels, c1, 3, 2, padding=2) if small else nn.Conv2d(channels, c1, 11, 4, padding=2)
        self.features = nn.Sequential(
            first,
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c1, c2, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c4, c5, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(c5 * 36, h1),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(h1, h2),
            nn.ReLU(inplace=True),
            nn.Linear(h2, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))
