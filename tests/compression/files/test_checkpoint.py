"""A compressed network on disk and back."""

import copy

import torch
from torch import nn

from nm_lightning import compress, load, save


def test_a_bias_is_made_saved_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(100, 6)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x)
    assert result.model[2].bias.shape == (4,)
    assert model[2].bias is None
    save(result, tmp_path / "small.pt")
    loaded = load(tmp_path / "small.pt", into=copy.deepcopy(model))
    assert torch.equal(loaded(x), result.model(x))
    assert torch.equal(copy.deepcopy(result.model)(x), result.model(x))
