"""Layers that forward never calls: listed, and what they may hang on stays whole."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, load, save
from nm_lightning.compression import Compressor, Recipe


class Net(nn.Module):
    """A network of two hidden layers, and whatever else hangs on it."""

    def __init__(self, **more):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 20), nn.Linear(20, 16), nn.Linear(16, 3)
        for name, part in more.items():
            setattr(self, name, part)

    def features(self, x):
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x):
        return self.head(self.features(x))


def test_a_layer_of_another_method_works_afterwards():
    net, x = Net(projection=nn.Linear(16, 8)), torch.randn(2, 6)
    result = compress(net, x, "prune", ratio=0.5)
    assert result.report.skipped["projection"] == "forward does not read it: left as it is"
    assert "projection, which forward does not read, may read its 16 neurons" in result.report.skipped["b"]
    assert result.report.widths == {"a": 10}
    assert result.model.projection(result.model.features(x)).shape == (2, 8)


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        (nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4)), {"b"}),  # its own 20, not the network's
        (nn.Parameter(torch.ones(3, 16)), {"b"}),
        (nn.BatchNorm1d(20), {"a"}),
        (nn.Linear(5, 16), set()),
        (nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16)), set()),  # a teacher
    ],
)
def test_only_what_may_be_read_stays_whole(part, whole):
    result = compress(Net(extra=part), torch.randn(2, 6), "prune", ratio=0.5)
    assert {"a", "b"} - set(result.report.widths) == whole


def test_a_moving_average_is_narrowed_with_what_it_follows(tmp_path):
    net = Net()
    net.ema = torch.optim.swa_utils.AveragedModel(nn.Sequential(net.a, nn.ReLU(), net.b))
    net.body = nn.Sequential(net.a, nn.ReLU(), net.b)
    result = compress(net, torch.randn(2, 6), "merge", ratio=0.5)
    assert result.report.skipped["ema.module"] == "a copy of body, narrowed with it"
    result.model.ema.update_parameters(result.model.body)
    save(result, tmp_path / "small.pt")
    fresh = copy.deepcopy(net)
    assert load(tmp_path / "small.pt", into=fresh).ema.module[0].out_features == 10
    assert torch.equal(fresh.ema.module[2].weight, fresh.b.weight)


def test_sites_stay_whole_that_the_caller_names():
    compressor = Compressor(Net(), torch.randn(2, 6), Recipe(), whole={"a": "because"})
    assert [site.name for site in compressor.subject.sites] == ["b"]
    assert compressor().report.skipped["a"] == "because"
