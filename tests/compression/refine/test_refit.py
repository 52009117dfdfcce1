"""Refit: Gauss-Newton on a site's layers, against dense algebra, and restoring what was lost on small and real nets."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress, trace
from nm_lightning.cli import compress as cli
from nm_lightning.compression.graph import graph_of
from nm_lightning.compression.refine import refit as refitting
from nm_lightning.compression.refine import window as windowing
from nm_lightning.compression.refine.refit import find_windows, look_ahead, refit
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.statistics.runs import Run
from nm_lightning.compression.structure.decomposition import assign
from nm_lightning.compression.structure.plan import plan_sites
from tests.networks import STRANGE, Attention, Residual, Strange, images, lively
from tests.oracles import gap


def windows_of(original, narrow, result, sites, x, size=32, horizon=0):
    graphs = [graph_of(network, x) for network in (original, narrow)]
    wanted, found = (
        Run(network, graph, x.split(size)) for network, graph in zip((original, narrow), graphs, strict=True)
    )
    windows, _ = find_windows(sites, result.plan, wanted, found, size)
    look_ahead([window for _, window in windows], horizon, len(x), found)
    return dict(windows)


def test_a_product_is_that_of_the_dense_jacobian():
    """`J^T W J d`, with W one over the end's energy and zero where the rectifier cuts both values."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    result = compress(model, x[:1], "prune", ratio=0.5)
    window = windows_of(model, result.model, result, trace(model, x[:1]).sites, x, 16)["0"]
    assert list(window.free) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    start = {name: parameter.detach() for name, parameter in window.free.items()}
    with torch.no_grad():
        loss = window.solve(0)
    direction = {name: torch.randn_like(value) for name, value in start.items()}
    with torch.no_grad():
        product = window.product(start, direction)

    def flat(vector):
        return torch.cat([value.flatten() for value in vector.values()])

    def end(parameters):
        return torch.func.functional_call(result.model[:3], parameters, (x,)).flatten()

    with torch.no_grad():
        target = model[:3](x)[:, result.keep["2"]].flatten()
        missing = torch.where(target <= 0, -end(start).clamp(min=0), target - end(start))
        counts = ((target > 0) | (end(start) > 0)).double() / target.square().sum()
    dense = torch.cat([part.flatten(1) for part in torch.func.jacrev(end)(start).values()], dim=1)
    torch.testing.assert_close(flat(product), dense.T @ (counts * (dense @ flat(direction))))
    assert loss == pytest.approx(float((counts * missing.square()).sum()))


def test_both_directions_are_torchs_derivatives():
    """Node by node, with the norms multiplied into the convolutions, as of the network that has them as layers."""
    model, x = lively(Residual()).double(), images(16).double()
    result = compress(model, x[:1], "prune", ratio=0.5)
    windows = windows_of(model, result.model, result, trace(model, x[:1]).sites, x, 16)
    assert any(window.folded for window in windows.values())
    for window in windows.values():
        start = {name: parameter.detach() for name, parameter in window.free.items()}
        direction = {name: torch.randn_like(value) for name, value in start.items()}
        with torch.no_grad():
            ((_, _, env),) = window.batches()
            linear = window.linear(env, start)
            changes = linear.push(direction)

        def plain(free, window=window, env=env):
            own = {
                name: {key: free[f"{name}.{key}"] for key, _ in layer.named_parameters(recurse=False)}
                for name, layer in window.layers.items()
            }
            return window.found.values(env, window.joins, own)

        values, expected = torch.func.jvp(plain, (start,), (direction,))
        torch.testing.assert_close(linear.values, values)
        torch.testing.assert_close(changes, expected)
        torch.testing.assert_close(linear.pull(changes), torch.func.vjp(plain, start)[1](expected)[0])


def test_one_layer_is_solved_in_one_step(monkeypatch):
    """What reads a changed layer is linear least squares, and the whole Gram matrix makes conjugate gradients exact."""
    monkeypatch.setattr(windowing, "DAMPING", 1e-12)
    monkeypatch.setattr(windowing, "ITERATIONS", 1)
    monkeypatch.setattr(windowing, "POSITIONS", 10**6)
    torch.manual_seed(0)
    head = nn.Conv2d(4, 3, 1)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 3, 1)), images(64)
    result = compress(model, x[:1], "prune", widths=[4], sites="0")
    with torch.no_grad():
        result.model[3].weight.copy_(head.weight)
    window = windows_of(model, result.model, result, [], x)  # nothing changes without a site
    assert not window
    (site,) = trace(model, x[:1]).sites[:1]
    window = windows_of(model, result.model, result, [site], x)["3"]
    with torch.no_grad():
        window.solve(1)
        entries = result.model[:3](x).movedim(1, -1).flatten(0, -2)
        target = model(x).movedim(1, -1).flatten(0, -2)
        found = result.model(x).movedim(1, -1).flatten(0, -2)
    ones = torch.cat([entries, torch.ones(len(entries), 1)], dim=1).double()
    exact = ones @ torch.linalg.lstsq(ones, target.double()).solution
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [True, False])
def test_disturbed_layers_are_restored(norm):
    """The removed neurons said nothing, so there are weights that lose nothing: it finds some, from others."""
    model, x = lively(Residual(norm)), images(512)
    with torch.no_grad():
        for block in model.blocks:
            for layer in block[:2] if norm else block[:1]:
                for parameter in layer.parameters():
                    parameter[8:] = 0
    sites = trace(model, x[:1]).sites
    keeps = {site.name: torch.arange(8) for site in sites}
    narrow = compress(model, x[:1], "prune", ratio=0.5).model
    assert gap(narrow, model, x) < 1e-5
    torch.manual_seed(1)
    with torch.no_grad():
        for block in narrow.blocks:
            for parameter in block.parameters():
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    before = gap(narrow, model, images(64, seed=5))
    kept = copy.deepcopy(narrow.state_dict())
    values, errors, refused = refit(model, narrow, sites, plan_sites(sites, keeps), x.split(64), rounds=8)
    assert not refused
    assert all(torch.equal(kept[name], value) for name, value in narrow.state_dict().items()), "it is only read"
    assign(narrow, values)
    assert max(errors.values()) < 1e-4
    assert gap(narrow, model, images(64, seed=5)) < 0.05 * before


@pytest.mark.parametrize(("method", "share"), [("prune", 0.5), ("merge", 0.5), ("fold", 0.5), ("reconstruct", 1)])
def test_unseen_images_gain_after_every_method(method, share):
    model, x = lively(Residual()), images(512)
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rough, fine, again = (
        compress(model, x[:1], method, ratio=0.5, calibration=x, refit=rounds) for rounds in (0, 2, 2)
    )
    unseen = images(256, seed=9)
    with torch.no_grad():
        lost = [float((result.model(unseen) - model(unseen)).square().mean()) for result in (rough, fine)]
    assert lost[1] < share * lost[0]
    assert torch.equal(fine.model(x), again.model(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    wanted = {name: parameter.requires_grad for name, parameter in rough.model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in fine.model.named_parameters()} == wanted
    assert not fine.report.remarks and all(0 < site.error < 1 for site in fine.report.sites)


NETWORKS = {
    "depthwise and ReLU6": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU6(), nn.Conv2d(12, 4, 1), nn.Flatten(1)
    ),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(1)
    ),
    "flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.MaxPool2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(),
        nn.Linear(16, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_all_kinds_of_layers_gain(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), images(256)
    rough, fine = (compress(model, x[:1], "prune", ratio=0.25, calibration=x, refit=rounds) for rounds in (0, 2))
    assert len(fine.report.sites) >= 2 or name == "depthwise and ReLU6"
    with torch.no_grad():
        lost = [float((result.model(x) - model(x)).square().mean()) for result in (rough, fine)]
    assert lost[1] < 0.9 * lost[0]
    assert not fine.report.remarks


@pytest.mark.parametrize("name", STRANGE)
def test_strange_networks_are_never_worse(name):
    model, x = Strange(STRANGE[name]).eval(), images(120, (3, 6, 6))
    scope = "all" if "norm" in name or "broadcast" in name else "hidden"
    settings = {"ratio": 0.25, "scope": scope, "calibration": x}
    lost = []
    for rounds, horizon in ((0, 0), (1, 0), (1, 3)):
        network = compress(model, x[:1], "prune", refit=rounds, refit_horizon=horizon, **settings).model
        with torch.no_grad():
            lost.append(float((network(x.clone()) - model(x.clone())).square().mean()))
    assert max(lost[1:]) <= lost[0]
    assert model.inplace.inplace


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_heads(fused, horizon):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), Attention(16, 4, 8, fused), nn.Flatten(), nn.Linear(6 * 16, 3)).eval()
    x = torch.randn(256, 6, 12)
    (name,) = (site.name for site in trace(net, x[:1]).sites if site.name == "1.q")
    rough, fine = (
        compress(net, x[:1], "prune", widths={name: 2}, sites=name, calibration=x, refit=rounds, refit_horizon=horizon)
        for rounds in (0, 2)
    )
    with torch.no_grad():
        lost = [float((result.model(x) - net(x)).square().mean()) for result in (rough, fine)]
    if fused:  # torch has no forward derivative of it
        assert fine.report.remarks[0].startswith("1.q: not refit together: it can't be differentiated")
    else:
        assert lost[1] < 0.5 * lost[0] and not fine.report.remarks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model, x = lively(Residual()).to(dtype), images(256).to(dtype)
    rough, fine = (compress(model, x[:1], "prune", ratio=0.5, calibration=x, refit=rounds).model for rounds in (0, 1))
    assert {parameter.dtype for parameter in fine.parameters()} == {dtype}
    with torch.no_grad():
        lost = [float((network(x) - model(x)).float().square().mean()) for network in (rough, fine)]
    assert lost[1] < 0.7 * lost[0]


def test_with_a_horizon_the_ends_of_what_follows_count_too():
    torch.manual_seed(0)
    layers = [each for _ in range(4) for each in (nn.Conv2d(8, 8, 1), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Conv2d(8, 3, 1)), torch.randn(64, 8, 12, 12)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x)
    sites = trace(model, x[:1]).sites
    near, far = (
        [{node.name for node in window.joins} for window in windows.values()]
        for windows in (windows_of(model, result.model, result, sites, x, horizon=horizon) for horizon in (0, 2))
    )
    assert far == [set().union(*near[number : number + 3]) for number in range(len(near))] and len(near) > 3
    lost = []
    for horizon in (0, 2):
        small = compress(model, x[:1], "prune", ratio=0.5, calibration=x, refit=2, refit_horizon=horizon).model
        lost.append(gap(small, model, x))
    assert lost[1] < lost[0]


def test_what_is_left_alone_is_said():
    model, x = lively(Residual()), images(64)
    result = compress(model, x[:1], "prune", ratio=0.5, scope="all", calibration=x, refit=1)
    assert result.report.remarks == ["stem: not refit together: its layers make a residual stream together"]
    with pytest.raises(InputError, match="refit -1: give a whole number of rounds from 0"):
        compress(model, x[:1], calibration=x, refit=-1)
    with pytest.raises(InputError, match="refit looks at images"):
        compress(model, x[:1], refit=1)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)
            self.again = nn.Linear(24, 8)
            self.again.weight = self.down.weight

        def forward(self, x):
            h = F.relu(self.up(self.enc(x)))
            return self.down(h) + self.again(h)

    x = torch.randn(64, 8)
    result = compress(Tied(), x[:1], "prune", ratio=0.5, sites="up", calibration=x, refit=1)
    assert result.report.remarks == ["up: not refit together: down or its weight is used several times"]


class Lent(nn.Module):
    """The encoder's weight is read once more, outside of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.enc = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x + self.b(F.relu(self.a(x)))
        return torch.tanh(self.enc(y)) * 0.05 + 20 * F.linear(x, self.enc.weight)


@pytest.mark.parametrize("method", ["prune", "reconstruct"])
def test_a_weight_that_is_read_elsewhere_stays(method):
    model, x = Lent(), torch.randn(256, 8)
    narrow = compress(model, x[:1], method, ratio=0.75, sites="a", calibration=x, refit=2).model
    assert torch.equal(narrow.enc.weight, model.enc.weight)
    with torch.no_grad():
        assert (narrow(x) - model(x)).square().mean() < 1e-4


class Opaque(torch.autograd.Function):
    """An operation of the user's that functorch can't take."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class OpaqueLinear(nn.Linear):
    def forward(self, x):
        return Opaque.apply(F.linear(x, self.weight, self.bias))


class Auxiliary(nn.Module):
    """A branch that exists only in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        h = F.relu(self.a(x))
        return (self.b(h), self.aux(h)) if self.training else self.b(h)


def test_what_only_trains_does_not_count_and_what_has_no_derivative_is_said():
    x = torch.randn(64, 8)
    assert not compress(Auxiliary().eval(), x[:1], "prune", calibration=x, refit=1).report.remarks
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), OpaqueLinear(16, 4)).eval()
    result = compress(net, x[:1], "prune", calibration=x, refit=1)
    (remark,) = result.report.remarks
    assert remark.startswith("0: not refit together: it can't be differentiated: ")
    rough = compress(net, x[:1], "prune").model
    assert all(torch.equal(*pair) for pair in zip(result.model.parameters(), rough.parameters(), strict=True))


def test_a_rank_without_a_batch_adds_nothing():
    class Second(Ranks):
        rank, size = 1, 2

        def __init__(self):
            pass

        def total(self, *tensors):
            return list(tensors)

    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(40, 4)
    result = compress(model, x[:1], "prune")
    window = windows_of(model, result.model, result, trace(model, x[:1]).sites, x)["0"]
    window.count, before = 1, [parameter.clone() for parameter in result.model.parameters()]
    with torch.no_grad():
        assert window.solve(1, Second()) == 0
    assert all(torch.equal(*pair) for pair in zip(before, result.model.parameters(), strict=True))


def test_a_published_checkpoint(published, fashion_mnist, tmp_path):
    """LeNet with a fifth of its neurons: merging leaves 80.02 % at best (METHOD)."""
    flags = ["--checkpoint", str(published("lenet_300_100")), "--model", "lenet_300_100", "--data", "fashion_mnist"]
    cli.main([*flags, "--method", "merge", "--ratio", "0.8", "--refit", "4", "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["results"]
    assert row["accuracy"] > 0.86
    assert (
        row["recipe"]["then"] == [{"name": "refit", "rounds": 4, "horizon": 0}] and report["calibration_size"] == 1024
    )
    assert all(0 < site["error"] < 0.1 for site in row["sites"])


@pytest.mark.parametrize("gains", [True, False])
def test_a_refit_that_leads_away_from_the_original_is_left_away(gains, monkeypatch):
    nats = iter([0.2, 0.1] if gains else [0.1, 0.2])  # without, with
    monkeypatch.setattr(refitting, "divergence", lambda *given: next(nats))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 4)
    plain, refit_ = (compress(model, x[:1], "prune", ratio=0.5, calibration=x, refit=rounds) for rounds in (0, 1))
    same = all(torch.equal(own, refit_.model.state_dict()[name]) for name, own in plain.model.state_dict().items())
    assert same != gains
    assert refit_.report.notes == (
        [] if gains else ["refit left away: 0.2 nats an image from the original, 0.1 without"]
    )
