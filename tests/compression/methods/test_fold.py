"""Fold: clusters of equal neurons become one."""

import pytest
import torch

from nm_lightning import compress
from tests.networks import Residual, images, lively
from tests.oracles import gap


@pytest.mark.parametrize("norm", [True, False])
def test_folding_equal_neurons_changes_nothing(norm):
    model = lively(Residual(norm))
    with torch.no_grad():
        for block in model.blocks:
            for tensor in (*block[0].parameters(), *block[1].parameters(), *block[1].buffers()):
                if tensor.ndim:
                    tensor[8:] = tensor[:8]
    x = images(64)
    result = compress(model, x[:1], "fold", widths=[8, 8])
    assert gap(result.model, model, x) < 1e-4
    assert all(sorted((keep % 8).tolist()) == list(range(8)) for keep in result.keep.values())
