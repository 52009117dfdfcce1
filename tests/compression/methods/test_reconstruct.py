"""Reconstruct: exact where least squares can be exact, against the normal equations elsewhere, and on real networks."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress, trace
from nm_lightning.cli import compress as cli
from nm_lightning.compression.methods import reconstruct as reconstructing
from nm_lightning.compression.statistics.ranks import ALONE
from tests.networks import STRANGE, Attention, Residual, Strange, images, lively
from tests.oracles import gap


@pytest.mark.parametrize("norm", [True, False])
def test_neurons_that_others_add_up_to_are_removed_without_loss(norm):
    """Merging can't: each removed neuron is a sum of two. Nothing is rectified, so any twelve span the eight."""
    model = lively(Residual(norm, nn.Identity))
    for block in model.blocks:
        first = block[0]
        with torch.no_grad():
            first.weight[8:] = 0.3 * first.weight[:8] + 0.5 * first.weight[:8].roll(1, 0)
    x = images(128)
    result = compress(model, x[:1], "reconstruct", widths=[12, 12], calibration=x, ridge=1e-9)
    assert gap(result.model, model, images(32, seed=9)) < 2e-3
    assert gap(compress(model, x[:1], "merge", widths=[12, 12]).model, model, x) > 0.05
    assert all(row.error < 1e-4 for row in result.report.sites)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_reconstruct_beats_prune_on_unseen_images(ratio):
    model = lively(Residual())
    x, unseen = images(256), images(64, seed=9)
    solved = compress(model, x[:1], "reconstruct", ratio=ratio, calibration=x).model
    assert gap(solved, model, unseen) < 0.7 * gap(compress(model, x[:1], "prune", ratio=ratio).model, model, unseen)


def test_ratio_zero_changes_nothing():
    model = lively(Residual())
    x = images()
    for criterion in ("l2-norm", "output"):
        assert gap(compress(model, x[:1], "reconstruct", criterion, 0, calibration=x).model, model, x) == 0


def test_one_layer_solves_the_normal_equations():
    """Against `lstsq` on the augmented system, in a network whose second layer has no rectifier behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    ridge = 1e-2
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x, ridge=ridge)
    keep = result.keep["0"]
    with torch.no_grad():
        hidden = model[1](model[0](x))[:, keep]
        lacking = model(x) - hidden @ model[2].weight[:, keep].T - model[2].bias
        design = torch.cat([hidden, torch.ones(200, 1, dtype=torch.float64)], dim=1)
        penalty = (ridge * design.square().sum(dim=0)[:-1].mean()).sqrt() * torch.eye(7, dtype=torch.float64)[:6]
        padded = torch.cat([lacking, torch.zeros(6, 4, dtype=torch.float64)])
        expected = torch.linalg.lstsq(torch.cat([design, penalty]), padded).solution
    torch.testing.assert_close(result.model[2].weight, model[2].weight[:, keep] + expected[:-1].T)
    torch.testing.assert_close(result.model[2].bias, model[2].bias + expected[-1])


def test_few_images_get_a_ridge_by_which_each_half_says_the_other(monkeypatch):
    """Hardly more images than unknowns: the worst place for least squares without one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x, unseen, lost = torch.randn(40, 20), torch.randn(2000, 20), []
    for larger in (reconstructing.LARGER, 0):
        monkeypatch.setattr(reconstructing, "LARGER", larger)
        lost.append(gap(compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x).model, model, unseen))
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("limit", [None, float("inf")])
def test_a_ridge_grows_where_nothing_can_be_said_and_stays_where_all_can_or_images_are_plenty(limit):
    torch.manual_seed(0)
    read = torch.cat([torch.randn(1, 60, 20), torch.ones(1, 60, 1)], dim=2)
    wanted = {"noise": torch.randn(1, 60, 4), "all": 0.1 * read @ torch.randn(1, 21, 4)}
    found = {}
    for name, target in wanted.items():
        samples = [(read, target + 2, torch.full_like(target, 2.0))]
        halves = reconstructing.normal_equations(samples, 2, ALONE)
        found[name] = reconstructing.validated(1e-6, halves, samples, limit, ALONE)
    assert found["noise"] >= 0.1 and found["all"] <= 1e-5
    plenty = [tuple(100 * each for each in half) for half in halves]
    assert reconstructing.validated(1e-6, plenty, samples, limit, ALONE) == 1e-6


def test_the_input_is_left_alone_and_modes_are_kept():
    model = lively(Residual())
    model.train()
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images()
    for criterion in ("l2-norm", "output"):
        result = compress(model, x[:1], "reconstruct", criterion, 0.5, calibration=x, recalibrate_norm=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        modes = [module.training for module in model.modules()]
        assert [module.training for module in result.model.modules()] == modes
        assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())


def test_low_precision_is_solved_in_float32():
    model = lively(Residual())
    x = images(128)
    exact = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x).model
    half = compress(copy.deepcopy(model).bfloat16(), x[:1].bfloat16(), "reconstruct", ratio=0.5, calibration=x)
    assert {tensor.dtype for tensor in half.model.parameters()} == {torch.bfloat16}
    assert gap(half.model.float(), exact, x) < 0.1


def test_scope_all_grouped_and_shared_layers():
    import torchvision

    for name in ("resnext50_32x4d", "shufflenet_v2_x0_5", "mobilenet_v3_small"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name).eval()
        x = images(4, (3, 64, 64))
        result = compress(model, x[:1], "reconstruct", ratio=0.25, scope="all", calibration=x)
        with torch.no_grad():
            assert result.model(x).isfinite().all()


def test_a_mixing_norm_sees_the_survivors_only():
    """The statistics that the solve saw are those of the narrow network: its error is the one that was reported."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
            self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 200)

        def forward(self, x):
            x = self.embed(x)
            x = x + self.down(F.gelu(self.up(self.norm(x))))
            return self.head(x)

    model, x = Stream(), torch.randn(400, 6)
    result = compress(model, x[:1], "reconstruct", ratio=0.25, scope="all", calibration=x)
    with torch.no_grad():
        wanted = model(x)
        missing = float((wanted - result.model(x)).square().sum() / wanted.square().sum())
    stream = next(row for row in result.report.sites if row.name == "embed")
    assert stream.before == 12
    assert missing < 1.01 * stream.error  # the head is the last to be solved


@pytest.mark.parametrize("name", STRANGE)
def test_strange_networks_are_never_worse_than_pruned(name):
    model, x = Strange(STRANGE[name]).eval(), images(120, (3, 6, 6))
    kept = x.clone()
    scope = "all" if "norm" in name or "broadcast" in name else "hidden"

    def error(method, **settings):
        network = compress(model, x[:1], method, ratio=0.25, scope=scope, calibration=x, **settings).model
        with torch.no_grad():
            return float((network(x.clone()) - model(x.clone())).square().mean() / model(x.clone()).var())

    assert model.inplace.inplace
    pruned = error("prune")
    assert error("reconstruct") <= max(0.5 * pruned, 1e-10)
    for settings in ({"reconstruction": "channel"}, {"recalibrate_norm": True}):
        assert error("reconstruct", **settings) < float("inf")
    if name == "in place":  # PyTorch itself can't differentiate it
        with pytest.raises(InputError, match="can be differentiated"):
            error("reconstruct", criterion="output")
    else:
        assert error("reconstruct", criterion="output") < float("inf")
    assert torch.equal(x, kept)
    assert model.inplace.inplace
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_attention_outputs_are_solved_behind_removed_heads(fused):
    """A head that repeats another is made up for without loss; others cost less than pruned ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), Attention(16, 4, 8, fused), nn.Flatten(), nn.Linear(6 * 16, 3)).eval()
    for layer in (net[1].q, net[1].k, net[1].v):
        layer.weight.data[8:16] = layer.weight.data[:8] * (0.1 if layer is net[1].v else 1)
        layer.bias.data[8:16] = layer.bias.data[:8] * (0.1 if layer is net[1].v else 1)
    x = torch.randn(256, 6, 12)
    (site,) = (site for site in trace(net, x[:1]).sites if site.name == "1.q")
    exact = compress(net, x[:1], "reconstruct", widths={site.name: 3}, sites=site.name, calibration=x, ridge=1e-8)
    assert exact.report.sites[0].after == 3 and exact.report.sites[0].error < 1e-6
    assert gap(exact.model, net, x) < 1e-3
    errors = {}
    for method in ("prune", "reconstruct"):
        narrow = compress(net, x[:1], method, widths={site.name: 2}, sites=site.name, calibration=x[:128]).model
        with torch.no_grad():
            errors[method] = float((narrow(x[128:]) - net(x[128:])).square().mean())
    assert errors["reconstruct"] < errors["prune"] / 2


def test_a_published_checkpoint_without_labels(published, fashion_mnist, tmp_path):
    """LeNet with a fifth of its neurons: pruning leaves 66.76 %, merging 80.02 % at best (METHOD)."""
    flags = ["--checkpoint", str(published("lenet_300_100")), "--model", "lenet_300_100", "--data", "fashion_mnist"]
    flags += ["--method", "reconstruct", "--criterion", "l2-norm", "output", "--ratio", "0.8"]
    cli.main([*flags, "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    accuracy = {row["criterion"]: row["accuracy"] for row in report["results"]}
    assert accuracy["l2-norm"] > 0.81
    assert accuracy["output"] > 0.84
    assert report["calibration_size"] == 1024
