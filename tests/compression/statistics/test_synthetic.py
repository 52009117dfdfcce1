"""Images that a program draws."""

import torch

from nm_lightning.compression.statistics.synthetic import dead_leaves


def test_synthetic_images_are_drawn_by_seed():
    first = dead_leaves(4, (3, 16, 16), seed=1)
    assert torch.equal(first, dead_leaves(4, (3, 16, 16), seed=1))
    assert not torch.equal(first, dead_leaves(4, (3, 16, 16), seed=2))
    assert first.min() >= 0 and first.max() <= 1 and first.flatten(1).std(dim=1).min() > 0.01
