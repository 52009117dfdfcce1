"""The plan: numbers that layers know about themselves are true afterwards."""

import torch
from torch import nn

from nm_lightning import compress
from tests.networks import conv

IMAGE = (2, 3, 8, 8)


def test_numbers_are_true_afterwards():
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), conv(12, 12, groups=12), nn.PReLU(12), conv(12, 4))
    narrow = compress(model, torch.zeros(IMAGE), ratio=0.5).model
    first, norm, depthwise, prelu, last = narrow
    assert (first.out_channels, norm.num_features, prelu.num_parameters, last.in_channels) == (6, 6, 6, 6)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 6, 6)
