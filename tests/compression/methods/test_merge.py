"""Merge: without loss where it is exact, the paper's loops as an oracle, and a word where it falls back."""

import pytest
import torch
from torch import nn

from nm_lightning import compress, trace
from nm_lightning.models import build_model
from tests.networks import random_network

CRITERIA = ("l1-norm", "l2-norm", "l2-GM")


def duplicated(layer, copies, scale):
    """Append scaled copies of the first neurons to a layer."""
    for attribute in ("weight", "bias"):
        value = getattr(layer, attribute)
        if value is not None:
            setattr(layer, attribute, nn.Parameter(torch.cat([value.data, value.data[:copies] * scale])))


def read_by(layer, total):
    """Let a layer read `total` neurons, with random columns for the new ones."""
    out, columns, *rest = layer.weight.shape
    layer.weight = nn.Parameter(torch.randn(out, total * (columns // (total - 2)), *rest) / columns**0.5)


def linear():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(10, 3))
    duplicated(model[0], 2, 0.5)
    return model, torch.randn(5, 6)


def conv():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 4, 3), nn.Flatten(), nn.Linear(4, 3)
    )
    duplicated(model[0], 2, 0.5)
    return model, torch.randn(5, 3, 8, 8)


def across_flatten():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(10 * 36, 3))
    duplicated(model[0], 2, 0.5)
    return model, torch.randn(5, 3, 8, 8)


def conv_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 4, 3))
    duplicated(model[0], 2, 0.5)
    norm = model[1]
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    norm.eps = 0.0
    for target, source in ((8, 0), (9, 1)):  # the copy's norm: statistics scale with it, its output is 0.7 times
        norm.running_mean[target] = 0.5 * norm.running_mean[source]
        norm.running_var[target] = 0.25 * norm.running_var[source]
        norm.weight.data[target] = 0.7 * norm.weight.data[source]
        norm.bias.data[target] = 0.7 * norm.bias.data[source]
    return model.eval(), torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize("build", [linear, conv, across_flatten, conv_norm])
@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_duplicated_neurons_merge_without_loss(build, implementation):
    torch.manual_seed(0)
    model, images = build()
    with torch.no_grad():
        expected = model(images)
        options = {"formulation": "consistent", "implementation": implementation, "threshold": 0.9}
        result = compress(model, images, "merge", "l2-norm", ratio=0, widths={"0": 8}, **options)
        torch.testing.assert_close(result.model(images), expected, rtol=1e-5, atol=1e-5)
        pruned = compress(model, images, "prune", "l2-norm", ratio=0, widths={"0": 8}).model(images)
    assert not torch.allclose(pruned, expected, atol=1e-3), "pruning should lose something here"
    assert result.report.sites[0].merged == 2


@pytest.mark.parametrize(("name", "shape"), [("vgg16", (3, 32, 32)), ("wide_resnet_40_4", (3, 32, 32))])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_fast_equals_the_oracle(name, shape, criterion, ratio):
    """The whole network's outputs, one convolution in three compressed (the loops are slow)."""
    model = random_network(name, 10, shape)
    images = torch.randn(4, *shape)
    sites = [site.name for site in trace(model, images).sites if site.width <= 128][::3]
    outputs = {}
    for implementation in ("fast", "reference"):
        result = compress(model, images, "merge", criterion, ratio, sites=sites, implementation=implementation)
        assert result.report.sites
        with torch.no_grad():
            outputs[implementation] = result.model(images)
    torch.testing.assert_close(outputs["fast"], outputs["reference"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formulation", ["published", "textbook", "consistent"])
def test_formulations_equal_the_oracle(formulation):
    model = random_network("resnet20", 10, (3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        fast, slow = (
            compress(model, images, formulation=formulation, implementation=implementation).model(images)
            for implementation in ("fast", "reference")
        )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_alexnet_equals_the_oracle(criterion, ratio):
    """Both Linear layers at once, 4,096 wide as published but for the loops' sake a slice of it."""
    torch.manual_seed(0)
    model = build_model("alexnet", 10, (3, 32, 32), widths=(16, 24, 32, 24, 16, 96, 64)).eval()
    images = torch.randn(4, 3, 32, 32)
    outputs = []
    for implementation in ("fast", "reference"):
        result = compress(model, images, "merge", criterion, ratio, implementation=implementation)
        with torch.no_grad():
            outputs.append(result.model(images))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_zero_norm_weight_writes_no_infinity():
    model, images = conv_norm()
    model[1].weight.data[9] = 0
    for formulation in ("published", "textbook", "consistent"):
        result = compress(model, images, "merge", "l2-norm", ratio=0.5, formulation=formulation)
        with torch.no_grad():
            assert result.model(images).isfinite().all()


def test_merging_a_grouped_convolution_stays_within_its_groups():
    """Duplicates inside one group merge without loss; the copies of another group can't help."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=2)
    )
    model[0].weight.data[3:6] = 0.5 * model[0].weight.data[0:3]
    model[0].weight.data[9:12] = 0.5 * model[0].weight.data[6:9]
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        result = compress(model, x, "merge", "l2-norm", ratio=0.5, threshold=0.9)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert result.report.sites[0].merged == 6


class Between(nn.Module):
    """Two convolutions and a function between them."""

    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def used_after_a_change_in_place(x):
    x.add_(1.0)
    return x


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (nn.functional.gelu, "gelu is not positively homogeneous"),
        (nn.ReLU6(), "relu6 is not positively homogeneous"),
        (lambda x: x + 1, "a constant is added"),
        (lambda x: 1 / x, "divides a constant"),
        (lambda x: torch.ones(1) / x, "divides a constant"),
        (lambda x: x * x, "multiplied by itself"),
        (nn.ConstantPad2d(1, 2.0), "padded with a constant"),
        (lambda x: nn.functional.pad(x, (1, 1), value=2.0), "padded with a constant"),
        (used_after_a_change_in_place, "a constant is added"),
        (nn.PReLU(8), "a slope for each channel"),
        (nn.GroupNorm(2, 8), "mixes channels"),
    ],
)
def test_merge_says_where_it_falls_back(function, says):
    result = compress(Between(function), torch.zeros(1, 3, 8, 8))
    assert says in result.report.notes[0]
    assert (result.report.sites[0].merged, result.report.sites[0].method) == (0, "prune")


@pytest.mark.parametrize("function", [nn.LeakyReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(2), lambda x: x / 3, nn.PReLU()])
def test_merge_goes_where_scaling_passes(function):
    result = compress(Between(function), torch.zeros(1, 3, 8, 8), threshold=0)
    assert not result.report.notes
    assert (result.report.sites[0].merged, result.report.sites[0].method) == (4, "merge")
