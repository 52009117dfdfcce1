"""Fold: clusters of equal neurons become one."""

import pytest
import torch
from sklearn.cluster import KMeans

from nm_lightning import compress
from nm_lightning.compression.methods.fold import cluster
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


@pytest.mark.parametrize(("count", "size", "width"), [(40, 30, 10), (200, 300, 100), (200, 3, 20)])
def test_clusters_are_those_of_scikit_learn(count, size, width):
    points = torch.randn(count, size, generator=torch.Generator().manual_seed(count + size))
    means = KMeans(width, n_init=3, random_state=7)
    assert torch.equal(cluster(points, width, 7), torch.from_numpy(means.fit_predict(points.double().numpy())).long())


def test_equal_neurons_are_clustered():
    points = torch.randn(4, 6).repeat(5, 1)
    labels = cluster(points, 8)
    assert len(labels.unique()) == 8
    assert torch.equal(cluster(points, 4), cluster(points, 4)[:4].repeat(5))
