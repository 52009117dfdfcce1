"""The channel map: one ridge solution for all consumers of a site."""

import pytest
import torch
from torch import nn

from nm_lightning import InputError, compress
from tests.networks import Residual, images, lively
from tests.oracles import gap


def test_a_channel_map_finds_scaled_copies():
    model = lively(Residual(norm=False))
    with torch.no_grad():
        for block in model.blocks:
            for tensor in block[0].parameters():
                tensor[8:] = 0.5 * tensor[:8]
    x = images(64)
    settings = {"widths": [8, 8], "calibration": x, "ridge": 1e-9, "reconstruction": "channel"}
    result = compress(model, x[:1], "reconstruct", **settings)
    assert all(keep.tolist() == list(range(8)) for keep in result.keep.values())
    assert gap(result.model, model, x) < 1e-3


def test_channel_map_is_the_ridge_solution():
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).double()
    x = torch.randn(300, 6, dtype=torch.float64)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x, ridge=0, reconstruction="channel")
    keep = result.keep["0"]
    with torch.no_grad():
        hidden = model[1](model[0](x))
        scaling = torch.linalg.lstsq(hidden[:, keep], hidden).solution  # (k, n)
        torch.testing.assert_close(result.model[2].weight, model[2].weight @ scaling.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="reconstruction"):
        compress(model, x[:1], "reconstruct", calibration=x, reconstruction="both")
