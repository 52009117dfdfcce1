"""Copies: parametrised weights made plain, wrappers taken off."""

import pickle

import pytest
import torch
from torch import nn

from nm_lightning import compress


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm", "mask", "spectral_norm"])
def test_parametrised_weights_are_made_plain(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(model[0])
    elif kind == "old_weight_norm":
        nn.utils.weight_norm(model[0])
    elif kind == "mask":
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.3)
    else:
        nn.utils.parametrizations.spectral_norm(model[0])
    model.eval()
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = model(x)
        same = compress(model, x, ratio=0)
        torch.testing.assert_close(same.model(x), expected)
        assert "made plain" in same.report.notes[0]
        assert compress(model, x, ratio=0.5).model[0].weight.shape == (6, 6)
        torch.testing.assert_close(model(x), expected)


def test_wrappers_are_taken_off():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    narrow = compress(nn.DataParallel(torch.compile(model)), torch.zeros(1, 6), ratio=0.5).model
    assert type(narrow) is nn.Sequential
    assert pickle.loads(pickle.dumps(narrow))[0].out_features == 6
