"""Reconstruct: exact where least squares can be exact, against the normal equations elsewhere, and on real networks."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compress as cli
from nm_lightning import InputError, compress, load, save, trace
from nm_lightning.compression import cost
from nm_lightning.compression.calibration import batches_of, dead_leaves, recalibrate_norms
from nm_lightning.compression.output_aware import costs_of, eliminate, watch
from nm_lightning.compression.reconstruct import correlate, read_patches


class Residual(nn.Module):
    """A stem, two residual blocks with one norm each, and a head."""

    def __init__(self, norm: bool = True, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1, bias=not norm),
                nn.BatchNorm2d(16) if norm else nn.Identity(),
                activation(),
                nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular", bias=False),
                nn.BatchNorm2d(8) if norm else nn.Identity(),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        features = self.stem(images)
        for block in self.blocks:
            features = features + block(F.relu(features))
        return self.head(F.relu(features).mean(dim=(2, 3)))


def images(count=64, shape=(3, 8, 8), seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def lively(model):
    """BatchNorm statistics of the images themselves."""
    recalibrate_norms(model.eval(), [images(256, seed=3)])
    return model.eval()


def gap(first, second, x):
    with torch.no_grad():
        return float((first(x) - second(x)).abs().max() / second(x).abs().max())


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
        patches, gap = read_patches(version, x, stays, groups), torch.randn_like(layer(x))
        dim = 1 if layer.weight.ndim > 2 else -1
        flat = gap.movedim(dim, -1).reshape(-1, groups, 4 // groups).transpose(0, 1)
        torch.testing.assert_close(correlate(version, x, gap, stays), patches.transpose(1, 2) @ flat)


def test_a_bias_is_made_saved_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(100, 6)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x)
    assert result.model[2].bias.shape == (4,)
    assert model[2].bias is None
    save(result, tmp_path / "small.pt")
    loaded = load(tmp_path / "small.pt", into=copy.deepcopy(model))
    assert torch.equal(loaded(x), result.model(x))
    assert torch.equal(copy.deepcopy(result.model)(x), result.model(x))


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


def test_a_channel_map_finds_scaled_copies():
    model = lively(Residual(norm=False))
    with torch.no_grad():
        for block in model.blocks:
            for tensor in block[0].parameters():
                tensor[8:] = 0.5 * tensor[:8]
    x = images(64)
    settings = {"widths": [8, 8], "calibration": x, "ridge": 1e-9, "reconstruction": "channel"}
    result = compress(model, x[:1], "reconstruct", **settings)
    assert all(keep.tolist() == list(range(8)) for keep in result.keep.values())
    assert gap(result.model, model, x) < 1e-3


def test_channel_map_is_the_ridge_solution():
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4)).double()
    x = torch.randn(300, 6, dtype=torch.float64)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x, ridge=0, reconstruction="channel")
    keep = result.keep["0"]
    with torch.no_grad():
        hidden = model[1](model[0](x))
        scaling = torch.linalg.lstsq(hidden[:, keep], hidden).solution  # (k, n)
        torch.testing.assert_close(result.model[2].weight, model[2].weight @ scaling.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="reconstruction"):
        compress(model, x[:1], "reconstruct", calibration=x, reconstruction="both")


def test_elimination_drops_what_costs_nothing_first():
    """Neurons that are sums of others go first, and at no cost; every cell keeps its share."""
    torch.manual_seed(0)
    hidden = torch.randn(500, 6, dtype=torch.float64)
    hidden[:, 4] = hidden[:, 0] + 2 * hidden[:, 1]
    gram = hidden.T @ hidden / 500 + 1e-9 * torch.eye(6, dtype=torch.float64)
    weight = torch.randn(6, 3, dtype=torch.float64)
    rows = torch.arange(6)[:, None]
    gone_at, costs = eliminate([(gram.inverse(), weight.clone(), rows)], 3, torch.zeros(6, dtype=torch.long))
    assert int(gone_at.argmin()) in (0, 1, 4)
    assert costs[0] < 1e-6 * costs[1]
    assert (gone_at == 6).sum() == 3
    left = [index for index in range(6) if gone_at[index] == 6]
    solved = torch.linalg.lstsq(hidden[:, left], hidden @ weight).solution
    loss = (hidden @ weight - hidden[:, left] @ solved).square().sum() / 500
    torch.testing.assert_close(costs.sum(), loss, rtol=1e-4, atol=1e-6)
    cells = torch.tensor([0, 0, 0, 1, 1, 1])
    gone_at, _ = eliminate([(gram.inverse(), weight.clone(), rows)], 4, cells)
    assert torch.bincount(cells[gone_at == 6]).tolist() == [2, 2]


def test_costs_are_those_of_the_removals():
    """On a linear network: the costs of the removals add up to what they cost together, in squared error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Identity(), nn.Linear(10, 4)).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    found = trace(model, x).sites
    each = costs_of(found, watch(model, found, [x]), ridge=1e-9)["0"]
    assert each.shape == (9,)
    assert float(each[:4].max()) < 1e-6 * float(each[4:].min())  # the inputs are six: four neurons cost nothing


@pytest.mark.parametrize("what", ["parameters", "macs"])
@pytest.mark.parametrize("method", ["prune", "reconstruct"])
def test_a_target_is_met_where_it_costs_least(what, method):
    """One block's neurons all come twice, the other's not: the first gives up its copies before the second pays."""
    model = lively(Residual())
    with torch.no_grad():
        first = model.blocks[0]
        for tensor in (*first[0].parameters(), *first[1].parameters(), *first[1].buffers()):
            if tensor.ndim:
                tensor[8:] = tensor[:8]
    x = images(128)
    result = compress(model, x[:1], method, calibration=x, **{f"target_{what}": 0.6})
    before, after = (getattr(cost(network, x[:1]), what) for network in (model, result.model))
    assert 0.5 * before < after <= 0.6 * before
    assert result.report.widths["blocks.0.0"] <= 8 < result.report.widths["blocks.1.0"] + 3
    assert result.report.widths["blocks.0.0"] < result.report.widths["blocks.1.0"]


def test_bad_targets_are_one_line():
    model, x = Residual().eval(), images(8)
    for settings, says in (
        ({"target_macs": 1.5}, "target_macs 1.5"),
        ({"target_macs": 0.5, "target_parameters": 0.5}, "one of"),
        ({"target_macs": 0.5, "widths": [8, 8]}, "one of"),
        ({"target_parameters": 0.01}, "can't bring"),
    ):
        with pytest.raises(InputError, match=says):
            compress(model, x[:1], "prune", calibration=x, **settings)
    with pytest.raises(InputError, match="target_macs looks at images"):
        compress(model, x[:1], "prune", target_macs=0.5)


@pytest.mark.parametrize(("method", "share"), [("prune", 0.8), ("reconstruct", 0.97)])
def test_finetuning_learns_the_originals_predictions(method, share):
    model, x = lively(Residual()), images(256)
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"method": method, "ratio": 0.5, "calibration": x}
    rough, fine, again = (compress(model, x[:1], finetune=epochs, **settings).model for epochs in (0, 20, 20))

    def divergence(network):
        with torch.no_grad():
            pair = (network(x).log_softmax(1), model(x).log_softmax(1))
        return float(F.kl_div(*pair, reduction="batchmean", log_target=True))

    assert divergence(fine) < share * divergence(rough)
    assert torch.equal(fine(x), again(x))
    assert torch.equal(fine.stem.weight, rough.stem.weight)
    assert torch.equal(fine.blocks[0][1].running_mean, rough.blocks[0][1].running_mean)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not fine.training
    with pytest.raises(InputError, match="finetune -1"):
        compress(model, x[:1], finetune=-1, **settings)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 3, self.bias)


def rewritten(model, x):
    """In-place operations whose results are dropped, read again, or read under the old name."""
    x = model.stem(x)
    F.relu_(x)
    x = x.add_(model.mix(x)).relu_()
    z = model.inplace(x)
    return model.head((model.last(z) + x).mean(dim=(2, 3)))


STRANGE = {
    "in place": rewritten,
    "a constant in the code": lambda m, x: m.head(
        F.relu(m.mix(F.relu(m.stem(x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))))).mean(dim=(2, 3))
    ),
    "two sites in a mixing norm": lambda m, x: m.wide(
        m.group(torch.cat([F.relu(m.stem(x)), F.relu(m.second(x))], dim=1)).mean(dim=(2, 3))
    ),
    "a broadcast addition": lambda m, x: m.head(
        (s := F.relu(m.stem(x))).add(m.last(F.relu(m.mix(s.mean(dim=(2, 3), keepdim=True))))).mean(dim=(2, 3))
    ),
    "norm over tokens": lambda m, x: m.head(m.tokens(m.down(F.relu(m.up(m.stem(x).flatten(2).mT)))).mean(dim=1)),
    "alpha": lambda m, x: m.head(torch.add(s := m.stem(x), m.last(F.relu(m.mix(s))), alpha=10).mean(dim=(2, 3))),
    "one norm for two": lambda m, x: m.head(
        m.last(F.relu(m.norm(m.mix(F.relu(m.norm(m.bare(F.relu(m.stem(x))))))))).mean(dim=(2, 3))
    ),
    "keywords": lambda m, x: m.head(input=F.relu(m.mix(input=F.relu(m.stem(input=x)))).mean(dim=(2, 3))),
    "a linear that scales": lambda m, x: m.scaled(F.relu(m.up(F.relu(m.stem(x)).mean(dim=(2, 3))))),
}


class Strange(nn.Module):
    """Layers for the forwards above."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.stem, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.mix, self.last = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 12, 1, bias=False)
        self.bare = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm, self.tokens, self.group = nn.BatchNorm2d(12), nn.BatchNorm1d(36), nn.GroupNorm(1, 24)
        self.up, self.down, self.inplace = nn.Linear(12, 24), nn.Linear(24, 12), nn.ReLU(inplace=True)
        self.head, self.wide, self.scaled = nn.Linear(12, 5), nn.Linear(24, 5), Scaled(24, 5)

    def forward(self, x):
        return self.function(self, x)


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


def test_logits_are_needed_where_predictions_are_compared():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.down(F.relu(self.up(x))), x

    model, x = Pair(), torch.randn(50, 6)
    assert compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x).report.widths == {"up": 6}
    for settings in ({"criterion": "output"}, {"target_macs": 0.5}, {"finetune": 1}):
        with pytest.raises(InputError, match="gives tuple"):
            compress(model, x[:1], "reconstruct", calibration=x, **settings)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [0, -3, 1.5, True])
def test_bad_calibration_sizes_are_one_line(size):
    with pytest.raises(InputError, match="calibration_size"):
        batches_of(images(8), images(1), size)


def test_synthetic_images_are_drawn_by_seed():
    first = dead_leaves(4, (3, 16, 16), seed=1)
    assert torch.equal(first, dead_leaves(4, (3, 16, 16), seed=1))
    assert not torch.equal(first, dead_leaves(4, (3, 16, 16), seed=2))
    assert first.min() >= 0 and first.max() <= 1 and first.flatten(1).std(dim=1).min() > 0.01


def test_bad_calibration_is_one_line():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(10, 6)
    for given, says in (
        (None, "calibration"),
        (x[:0], "no images"),
        (x[:, :4], "the network reads"),
        ("elsewhere", "elsewhere"),
        ("synthetic", "synthetic"),
        (x * float("nan"), "not finite"),
    ):
        with pytest.raises(InputError, match=says):
            compress(model, x[:1], "reconstruct", ratio=0.5, calibration=given)
    with pytest.raises(InputError, match="ridge"):
        compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x, ridge=-1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(10)), 4)
    assert sum(map(len, batches_of(loader, x[:1], 7))) == 7


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


@pytest.mark.parametrize("fused", [True, False])
def test_attention_outputs_are_solved_behind_removed_heads(fused):
    """A head that repeats another is made up for without loss; others cost less than pruned ones."""
    from test_graph import Attention

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
