"""A compressed network on disk and back."""

import copy

import pytest
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


class Keeps(nn.Module):
    """Keeps what it computed of a parameter until it moves, as timm's attention keeps its biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(6, 12), nn.Linear(12, 3), {}
        self.table = nn.Parameter(torch.randn(1, 12))

    def _apply(self, function, *args, **kwargs):
        self.kept = {}
        return super()._apply(function, *args, **kwargs)

    def forward(self, x):
        if "table" not in self.kept:
            self.kept["table"] = self.table * 2
        return self.b(torch.relu(self.a(x) + self.kept["table"]))


class Caches(Keeps):
    """Keeps it for good, as transformers' LeViT does in evaluation, but says that it is a cache."""

    def __init__(self):
        super().__init__()
        self.table_cache = self.kept

    def _apply(self, function, *args, **kwargs):
        kept = self.kept
        super()._apply(function, *args, **kwargs)
        self.kept = kept
        return self


@pytest.mark.parametrize("kind", [Keeps, Caches])
def test_a_network_that_has_run_is_loaded_into(kind, tmp_path):
    model, x = kind(), torch.randn(4, 6)
    with torch.no_grad():
        result = compress(model, x, "prune", ratio=0.5)
        assert result.model.a.out_features == 6
        save(result, tmp_path / "small.pt")
        model(x)
        assert torch.equal(load(tmp_path / "small.pt", into=copy.deepcopy(model))(x), result.model(x))
        again = compress(model, x, "prune", ratio=0.5).model
        assert torch.equal(again(x), result.model(x))
