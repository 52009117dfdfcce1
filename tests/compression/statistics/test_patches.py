"""Patches: what a layer multiplies its weight with."""

import copy

import pytest
import torch
from torch import nn

from nm_lightning.compression.statistics.patches import at_rows, draw_rows, gram_of, places_of, read_patches


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding=1, groups=2),
        nn.Conv3d(6, 4, 2, stride=2),
    ],
    ids=lambda layer: str(layer),
)
def test_patches_are_what_the_weight_is_multiplied_with(layer):
    """Also through a subclass' own forward, which is tried with one tap at a time."""

    class Own(type(layer)):
        def forward(self, images):
            return super().forward(images)

    groups = getattr(layer, "groups", 1)
    shape = {2: (5, 6), 3: (2, 6, 9), 4: (2, 6, 9, 8), 5: (2, 6, 4, 4, 4)}[layer.weight.ndim]
    x = torch.randn(shape)
    own = copy.deepcopy(layer)
    own.__class__ = Own
    own.register_forward_pre_hook(lambda layer, args: pytest.fail("a hook was called"))
    weight = layer.weight.flatten(2).transpose(1, 2) if layer.weight.ndim > 2 else layer.weight.unsqueeze(1)
    weight = weight.flatten(1).view(groups, 4 // groups, -1)
    outputs = layer(x).movedim(1, -1).reshape(-1, groups, 4 // groups).transpose(0, 1)
    for version in (layer, own):
        patches = read_patches(version, x, torch.ones(6, dtype=torch.bool), groups)
        found = patches[..., :-1] @ weight.transpose(1, 2) + layer.bias.view(groups, 1, -1)
        torch.testing.assert_close(found, outputs)
        assert bool((patches[..., -1] == 1).all())
        stays = torch.tensor([True, False, True, True, True, False])  # two of each group
        patches, places = read_patches(version, x, stays, groups), places_of(layer, layer(x).shape)
        torch.testing.assert_close(gram_of(patches), (patches.transpose(1, 2) @ patches).double())
        rows = draw_rows(len(x), places, 2, seed=3)  # all rows where there are no more than two
        some = read_patches(version, x, stays, groups, rows)
        assert torch.equal(some, patches if rows is None else patches[:, rows])
        dim = 1 if layer.weight.ndim > 2 else -1
        flat = layer(x).movedim(dim, -1).reshape(-1, 4)
        assert torch.equal(at_rows(layer(x), rows, dim), flat if rows is None else flat[rows])


def test_each_image_gives_equally_many_positions_and_none_twice():
    rows = draw_rows(5, 12, 7)
    assert len(rows.unique()) == 35
    assert torch.equal(torch.bincount(rows // 12), torch.full((5,), 7))


class Scaled(nn.Conv2d):
    """Does more with its input than to look at it."""

    def forward(self, images):
        return super().forward(2 * images)


def test_positions_of_a_layer_that_changes_its_input():
    layer, x = Scaled(3, 4, 3), torch.randn(2, 3, 6, 6)
    every, rows = torch.ones(3, dtype=torch.bool), torch.tensor([0, 5, 31])
    patches = read_patches(layer, x, every, rows=rows)
    torch.testing.assert_close(
        patches, 2 * read_patches(nn.Conv2d(3, 4, 3), x, every)[:, rows] + torch.tensor([0.0] * 27 + [-1.0])
    )
