"""Layers that compute their weight become plain ones that say the same, and nothing else does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, load, save
from nm_lightning.compression.structure.computed import plain_layer


class Standardised(nn.Conv2d):
    """Each filter has mean 0 and variance 1, and a gain of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, weight.view_as(self.weight) * self.gain, self.bias, self.stride, self.padding)


class Equalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Same(Standardised):
    """Pads by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Dynamic(nn.Linear):
    """The weight depends on the input."""

    def forward(self, x):
        return F.linear(x, self.weight * x.mean(), self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + torch.randn_like(self.weight), self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight * 3, self.bias)


class Plain(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        Standardised(3, 12, 3, padding=1, bias=False), nn.ReLU(), Standardised(12, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), Equalised(16, 8), nn.ReLU(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def test_the_plain_layer_says_the_same():
    for layer, x in ((Standardised(6, 8, 3, stride=2), torch.randn(4, 6, 9, 9)), (Equalised(6, 8), torch.randn(4, 6))):
        made = plain_layer(layer)
        assert type(made) is type(layer).__base__ and made.training
        assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize(
    "layer", [Same(3, 8, 3), Dynamic(6, 8), Noisy(6, 8), Twice(6, 8), Plain(6, 8), nn.Linear(6, 8)]
)
def test_others_stay_as_they_are(layer):
    before = torch.random.get_rng_state()
    assert plain_layer(layer) is None and layer.training
    assert torch.equal(before, torch.random.get_rng_state())


@torch.no_grad()
def test_dead_neurons_go_without_loss_and_it_loads_again(tmp_path):
    model, x = network(), torch.randn(2, 3, 8, 8)
    for layer in (model[0], model[2]):
        layer.gain[::2] = 0
    model[2].bias[::2] = 0
    result = compress(model, x, "prune", "l1-norm", ratio=0.5, sites=["0", "2"])
    assert result.keep["0"].tolist() == list(range(1, 12, 2))
    assert torch.allclose(result.model(x), model(x), atol=1e-5)
    assert isinstance(model[0], Standardised), "the original is as it was"
    assert any("Standardised" in note for note in result.report.notes)
    save(result, tmp_path / "small.pt")
    assert torch.equal(load(tmp_path / "small.pt", into=network())(x), result.model(x))
