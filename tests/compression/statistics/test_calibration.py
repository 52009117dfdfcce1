"""Calibration images: whatever gives batches, and one line for what does not fit."""

import pytest
import torch
from torch import nn

from nm_lightning import InputError, compress
from nm_lightning.compression.statistics.calibration import Calibration
from tests.networks import images


@pytest.mark.parametrize("size", [0, -3, 1.5, True])
def test_bad_calibration_sizes_are_one_line(size):
    with pytest.raises(InputError, match="calibration_size"):
        _ = Calibration(images(8), images(1), size).batches


def test_bad_calibration_is_one_line():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(10, 6)
    for given, says in (
        (None, "calibration"),
        (x[:0], "no images"),
        (x[:, :4], "the network reads"),
        ("elsewhere", "elsewhere"),
        ("synthetic", "synthetic"),
        (x * float("nan"), "not finite"),
    ):
        with pytest.raises(InputError, match=says):
            compress(model, x[:1], "reconstruct", ratio=0.5, calibration=given)
    with pytest.raises(InputError, match="ridge"):
        compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x, ridge=-1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(10)), 4)
    assert sum(map(len, Calibration(loader, x[:1], 7).batches)) == 7
