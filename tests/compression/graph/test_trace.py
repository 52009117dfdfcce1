"""What a trace finds, and the reason for what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress, trace
from tests.networks import Graph, conv

IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 12)


def test_a_number_in_the_users_code_is_refused_in_one_line():
    model = Graph(lambda n, x: n.fc(n.a(x).view(-1, 12 * 64)), a=conv(3, 12), fc=nn.Linear(12 * 64, 4))
    found = trace(model, torch.zeros(IMAGE))
    assert not found.sites
    assert "768" in found.skipped["a"]
    assert "test_trace.py, line" in found.skipped["a"]


class Standardised(nn.Conv2d):
    """A subclass whose weight is standardised over its columns before use."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


def test_a_subclass_that_standardises_its_weight_keeps_its_columns():
    model = nn.Sequential(conv(3, 12), nn.ReLU(), Standardised(12, 8, 3), nn.ReLU(), conv(8, 4))
    found = trace(model, torch.zeros(IMAGE))
    assert [site.name for site in found.sites] == ["2"]
    assert "not linear in its weight" in found.skipped["0"]


def test_layers_that_are_not_looked_into_are_listed():
    model = nn.Sequential(nn.Linear(12, 12), nn.GRUCell(12, 12), nn.Linear(12, 3))
    found = trace(model, torch.zeros(2, 12))
    assert "not looked into" in found.skipped["1"]
    assert "grucell" in found.skipped["0"]


def test_what_cannot_be_traced_names_the_users_line():
    model = Graph(lambda n, x: n.a(x) if x.sum() > 0 else n.b(x), a=conv(3, 12), b=conv(3, 12))
    with pytest.raises(InputError, match=r"decides by an activation's values \(test_trace\.py, line \d+\)"):
        trace(model, torch.zeros(IMAGE))
    with pytest.raises(InputError, match=r"rejects an input of shape \(2, 7\)"):
        trace(nn.Sequential(conv(3, 4)), torch.zeros(2, 7))


def test_outputs_may_be_tuples_and_dicts():
    for wrap in (lambda y: (y, y), lambda y: {"logits": y}):
        model = Graph(lambda n, x, wrap=wrap: wrap(n.b(F.relu(n.a(x)))), a=conv(3, 12), b=conv(12, 4))
        assert compress(model, torch.zeros(IMAGE), ratio=0.5).model.a.out_channels == 6


def test_a_network_without_a_site_says_why():
    result = compress(nn.Sequential(nn.Linear(6, 3)), torch.zeros(1, 6))
    assert not result.report.sites
    assert result.report.skipped == {"0": "its neurons are the network's outputs"}


def test_a_weight_read_outside_its_layer_stays():
    """An output that is the embedding's own weight, transposed: its width is the network's output."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            h = self.enc(x)
            h = h + self.down(F.relu(self.up(h)))
            return F.linear(h, self.enc.weight.t())

    model, x = Tied(), torch.randn(40, 16)
    for method in ("prune", "reconstruct"):
        result = compress(model, x[:1], method, ratio=0.25, scope="all", calibration=x)
        assert result.model(x).shape == (40, 16)
        assert result.report.widths == {"up": 18}
