"""LeNet-300-100 (LeCun et al., "Gradient-based learning applied to document recognition", 1998)."""

from math import prod

from torch import Tensor, nn

from nm_lightning.models.registry import register


@register("lenet_300_100", hidden=lambda: 2)
class LeNet(nn.Module):
    """Two hidden Linear layers, ReLU between, on the flattened image.

    Args:
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: neurons of `ip1` and `ip2`.
    """

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int], widths: tuple[int, int] = (300, 100)):
        super().__init__()
        first, second = widths
        self.ip1 = nn.Linear(prod(input_shape), first)
        self.ip2 = nn.Linear(first, second)
        self.ip3 = nn.Linear(second, num_classes)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        hidden = self.relu(self.ip1(images.flatten(1)))
        return self.ip3(self.relu(self.ip2(hidden)))
