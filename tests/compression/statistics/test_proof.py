"""Before weights are solved, the narrow network says what the masked wide one says; what can't is left whole."""

import math
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress
from nm_lightning.compression.graph.trace import trace
from nm_lightning.compression.statistics import proof
from nm_lightning.compression.structure.copies import plain_copy


class Scaled(nn.Conv2d):
    """Equalised learning rate, of what the layer reads: it is scaled by the weight's own fan-in at each forward."""

    def forward(self, x):
        return F.conv2d(x * (2 / self.weight[0].numel()) ** 0.5, self.weight, self.bias, padding=self.padding)


PIECES = ("conv", "scaled", "root", "roll", "parts", "shift", "square", "thirds", "heads", "mean", "flip", "residual")


class Moving(nn.Module):
    """Pieces in a row: layers, and code that looks at the size or the place of channels while it runs."""

    def __init__(self, pieces, classes=5):
        super().__init__()
        self.pieces, self.layers, c = pieces, nn.ModuleList(), 12
        self.stem = nn.Conv2d(3, c, 1)
        for piece, number in pieces:
            made = []
            if piece in ("conv", "scaled"):
                d = (12, 24)[number % 2]
                made, c = [(Scaled if piece == "scaled" else nn.Conv2d)(c, d, 3, padding=1)], d
            elif piece == "parts":
                made, c = [nn.Conv2d(c // 2, 12, 1), nn.Conv2d(c - c // 2, 12, 1)], 12
            elif piece == "heads":
                made = [nn.Linear(c, 3 * c), nn.Linear(c, c)]
            elif piece == "residual":
                made = [nn.Conv2d(c, 12, 1), nn.Conv2d(12, c, 1)]
            self.layers.append(nn.ModuleList(made))
        self.head = nn.Linear(c, classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for (piece, number), layers in zip(self.pieces, self.layers, strict=True):
            x = self.step(piece, number, list(layers), x)
        return self.head(x.mean((2, 3)))

    def step(self, piece, number, layers, x):
        c = x.shape[1]
        if piece in ("conv", "scaled"):
            return F.relu(layers[0](x))
        if piece == "root":
            return x / math.sqrt(x.size(1))
        if piece == "roll":
            return torch.roll(x, 1 + number, dims=1)
        if piece == "parts":
            return F.relu(layers[0](x[:, : c // 2]) + layers[1](x[:, c // 2 :]))
        if piece == "shift":
            return torch.cat([torch.roll(x[:, : c // 4], 1, 2), x[:, c // 4 :]], 1)
        if piece == "square":
            return torch.cat([x[:, : c // 2].square(), x[:, c // 2 :]], 1)
        if piece == "thirds":
            first, second, third = x.chunk(3, 1)
            return torch.cat([second, first, third], 1) if number % 2 else torch.cat([first, second * 2, third], 1)
        if piece == "heads":
            n, _, h, w = x.shape
            q, k, v = layers[0](x.flatten(2).transpose(1, 2)).view(n, h * w, 3, 3, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + layers[1](mixed).transpose(1, 2).reshape(x.shape)
        if piece == "mean":
            return x * x.mean(1, keepdim=True)
        if piece == "flip":
            return x.flip(1)
        return x + layers[1](F.relu(layers[0](x)))


def dead(model, result):
    """A copy of the wide network in which the removed neurons never say anything: the rows that make them are zero."""
    wide, _ = plain_copy(model)
    for parameter_home in wide.modules():
        for name, parameter in parameter_home._parameters.items():
            if parameter is not None:
                parameter_home._parameters[name] = nn.Parameter(parameter.detach().clone())
    for site in result.sites:
        for member in site.producers:
            gone = ~member.stays(result.keep[site.name])
            for name, dim in member.slots:
                wide.get_parameter(name).data.movedim(dim, 0)[gone] = 0
    return wide


def build(pieces, seed):
    torch.manual_seed(seed)
    return Moving(pieces).double().eval(), torch.randn(2, 3, 4, 4).double()


def worst(pieces, seed, ratio, scope):
    """How far a pruned network is from the wide one with dead neurons, as a share of the outputs' scale."""
    model, x = build(pieces, seed)
    result = compress(model, x, "prune", ratio=ratio, scope=scope)
    with torch.no_grad():
        wanted = dead(model, result)(x)
        return float((result.model(x) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)), result


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.integers(0, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    ratio=st.sampled_from([0.3, 0.5]),
    scope=st.sampled_from(["hidden", "all"]),
)
def test_moves_by_size_and_place_are_right_or_left_whole(pieces, seed, ratio, scope):
    apart, result = worst(pieces, seed, ratio, scope)
    assert apart <= 1e-6, (pieces, result.report.skipped)


def test_without_the_comparison_it_is_wrong(monkeypatch):
    """What the test above rests on."""
    pieces = [("conv", 0), ("scaled", 1), ("conv", 0)]
    assert worst(pieces, 0, 0.5, "hidden")[0] <= 1e-6
    monkeypatch.setattr(sys.modules["nm_lightning.compression.compress"], "prove", lambda subject, keeps: proof.Proof())
    assert worst(pieces, 0, 0.5, "hidden")[0] > 1e-5


def test_only_the_sites_to_blame_stay_whole():
    pieces = [("conv", 1), ("conv", 0), ("scaled", 0), ("conv", 0), ("conv", 1)]
    _, result = worst(pieces, 0, 0.5, "hidden")
    assert list(result.report.skipped) == ["head", "layers.1.0"]  # what the scaled layer reads
    assert "layers.2.0 is" in result.report.skipped["layers.1.0"]
    assert f"test_proof.py, line {Scaled.forward.__code__.co_firstlineno} read" in result.report.skipped["layers.1.0"]
    assert {row.name for row in result.report.sites} == {"stem", "layers.0.0", "layers.2.0", "layers.3.0", "layers.4.0"}
    assert all(row.after == row.before // 2 for row in result.report.sites)
    assert "drawn inputs" in result.report.compared


def test_the_line_to_blame_is_named():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            hidden = F.relu(self.a(x))
            return self.b(hidden / self.b.in_features)

    line = Divides.forward.__code__.co_firstlineno + 2
    assert f"test_proof.py, line {line}" in compress(Divides(), torch.zeros(2, 6)).report.skipped["a"]


def test_a_target_is_met_by_the_other_sites():
    model, x = build([("conv", 1), ("scaled", 1), ("conv", 1), ("conv", 1)], 0)
    images = torch.randn(32, 3, 4, 4).double()
    result = compress(model, x, "reconstruct", target_parameters=0.2, calibration=images)
    assert "layers.0.0" in result.report.skipped
    left, whole = (sum(p.numel() for p in network.parameters()) for network in (result.model, model))
    assert left <= 0.2 * whole
    assert "calibration images" in result.report.compared


@pytest.mark.parametrize("method", ["merge", "fold", "reconstruct"])
def test_every_method_is_compared(method):
    """A merged network with a scaled layer is as right as one whose layers of that kind stay whole."""
    model, x = build([("conv", 0), ("scaled", 1), ("conv", 0)], 3)
    result = compress(model, x, method, ratio=0.5, calibration=torch.randn(16, 3, 4, 4).double())
    assert "layers.0.0" in result.report.skipped and result.report.sites
    assert result.model.layers[1][0].in_channels == 12


class Mixed(nn.Module):
    """Layers that are called, by position and by name, and one whose weight is read."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.hidden, self.read, self.head = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.hidden(self.grouped(input=self.conv(x).relu()).relu().mean((2, 3)))
        return self.head(F.linear(x.relu(), self.read.weight, self.read.bias).relu())


def test_zeros_handed_to_layers_are_columns_silenced():
    torch.manual_seed(0)
    model, images = Mixed().eval(), torch.randn(4, 3, 9, 9)
    found = trace(model, images)
    keeps = {site.name: torch.arange(0, site.width, 2) for site in found.sites}
    assert {consumer.called for site in found.sites for consumer in site.consumers} == {True, False}
    pair = [proof.masked(model, found.sites, keeps, model, copied)(images) for copied in (True, False)]
    torch.testing.assert_close(*pair)
    assert (pair[0] - model(images)).abs().max() > 0.01


def test_a_network_that_wants_whole_batches_gets_them():
    class Frames(nn.Module):
        """Refuses a batch of two, as one that views clips of four frames does."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
            self.a.register_forward_pre_hook(self.whole)

        @staticmethod
        def whole(layer, inputs):
            if len(inputs[0]) % 4:
                raise ValueError("clips have 4 frames")

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    assert "on 8 drawn inputs" in compress(Frames(), torch.zeros(8, 6), "prune").report.compared
    with pytest.raises(InputError, match=r"Frames rejects an input of shape \(7, 6\): clips have 4 frames"):
        compress(Frames(), torch.zeros(7, 6), "prune")


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.body(x) + 1


def bound(net):
    net.forward = net.features


def closure(net):
    net.forward = lambda x: net.features(x)


def compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    net(torch.randn(2, 6))


def lock(net):
    net.lock, net.kept = threading.Lock(), [net(torch.randn(2, 6))]


@pytest.mark.parametrize("change", [bound, closure, compiled, compiled_in_place, lock])
def test_a_copy_owns_its_forward(change):
    """Its weights are the ones that it runs, whatever hangs on the module; and the original is as it was."""
    torch.manual_seed(0)
    net, x = Own(), torch.randn(2, 6)
    change(net)
    wanted = net(x).detach()
    twin, _ = plain_copy(net)
    assert torch.equal(twin(x), wanted)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(torch.zeros_like(parameter))
    assert not twin(x).detach().sub(1).any() or not twin(x).any()
    assert torch.equal(net(x), wanted)
