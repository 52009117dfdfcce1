"""Prune: removing neurons is silencing them."""

import pytest
import torch

from nm_lightning import compress, trace
from tests.networks import ARCHITECTURES, random_network
from tests.oracles import masked


@pytest.mark.parametrize(("name", "shape"), ARCHITECTURES)
def test_pruned_equals_masked(name, shape):
    """Removing neurons gives the same outputs as zeroing the columns that read them."""
    model = random_network(name, 7, shape)
    images = torch.randn(2, *shape)
    result = compress(model, images, method="prune", ratio=0.4)
    silenced = masked(model, result, trace(model, images).sites)
    with torch.no_grad():
        torch.testing.assert_close(result.model(images), silenced(images), rtol=1e-5, atol=1e-5)
