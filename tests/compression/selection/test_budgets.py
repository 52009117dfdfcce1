"""How many neurons stay: widths of groups, and targets met where it costs least."""

import pytest
import torch
from torch import nn

from nm_lightning import InputError, compress, trace
from nm_lightning.compression import cost
from nm_lightning.compression.selection import budgets
from nm_lightning.compression.selection.budgets import multiple
from tests.networks import Attention, Residual, conv, images, lively, random_network

IMAGE = (2, 3, 8, 8)


def test_widths_of_groups_are_multiples():
    model = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4))
    with pytest.raises(InputError, match="multiple of 4"):
        compress(model, torch.zeros(IMAGE), widths={"0": 6})
    assert compress(model, torch.zeros(IMAGE), ratio=0.99).model[0].out_channels == 4


def copied_neurons():
    """A network with two blocks; in the first each neuron comes twice."""
    model = lively(Residual())
    with torch.no_grad():
        first = model.blocks[0]
        for tensor in (*first[0].parameters(), *first[1].parameters(), *first[1].buffers()):
            if tensor.ndim:
                tensor[8:] = tensor[:8]
    return model


@pytest.mark.parametrize("what", ["parameters", "macs"])
@pytest.mark.parametrize("method", ["prune", "reconstruct"])
def test_a_target_is_met_where_it_costs_least(what, method):
    """One block's neurons all come twice, the other's not: the first gives up its copies before the second pays."""
    model, x = copied_neurons(), images(128)
    result = compress(model, x[:1], method, calibration=x, **{f"target_{what}": 0.6})
    before, after = (getattr(cost(network, x[:1]), what) for network in (model, result.model))
    assert 0.5 * before < after <= 0.6 * before
    assert result.report.widths["blocks.0.0"] <= 8 < result.report.widths["blocks.1.0"] + 3
    assert result.report.widths["blocks.0.0"] < result.report.widths["blocks.1.0"]


def test_spread_by_cost_takes_as_many_macs_where_they_cost_nothing():
    """Of one block's neurons, which all come twice, more than half may go, of the other's none: half of all go."""
    model = copied_neurons()
    x = images(128)
    even, by_cost = (
        compress(model, x[:1], "reconstruct", "output", ratio=0.3, spread=spread, calibration=x)
        for spread in ("even", "cost")
    )
    macs = [cost(result.model, x[:1]).macs for result in (even, by_cost)]
    assert 0.95 * macs[0] < macs[1] <= macs[0]
    assert by_cost.report.widths["blocks.0.0"] < even.report.widths["blocks.0.0"]
    assert by_cost.report.notes[0].startswith("spread cost: nearest to the original on held-out images (cost ")
    with torch.no_grad():
        errors = [(result.model(x) - model(x)).square().mean() for result in (even, by_cost)]
    assert errors[1] < 0.5 * errors[0]
    whole = compress(model, x[:1], "reconstruct", ratio=0.0, spread="cost", calibration=x)
    assert torch.equal(whole.model(x), model(x))


def test_spread_by_cost_leaves_to_the_norm_what_output_can_not_look_into():
    """A grouped convolution reads the first layer's neurons."""
    torch.manual_seed(0)
    grouped = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten()]
    model, x = nn.Sequential(*grouped, nn.Linear(24, 5)).eval(), torch.randn(32, 3, 8, 8)
    result = compress(model, x[:1], "reconstruct", ratio=0.5, spread="cost", calibration=x)
    assert set(result.report.widths) == {"0", "2", "4"}
    assert cost(result.model, x[:1]).macs < cost(model, x[:1]).macs


def test_a_target_of_latency_is_met_by_the_clock(monkeypatch):
    """A clock that counts multiply-accumulates gives the widths that a target of these gives."""
    model, x = copied_neurons(), images(64)
    monkeypatch.setattr(
        budgets,
        "share_of_time",
        lambda small, whole, inputs: cost(small, inputs[:1]).macs / cost(whole, inputs[:1]).macs,
    )
    by_time, by_macs = (
        compress(model, x[:4], "prune", calibration=x, **{target: 0.6}) for target in ("target_latency", "target_macs")
    )
    assert by_time.report.widths == by_macs.report.widths
    left = cost(by_time.model, x[:1]).macs / cost(model, x[:1]).macs
    (note,) = by_time.report.notes
    assert note == f"target_latency 0.6: {left:.2f} of the original's time, measured again with 4 on cpu"


def test_the_clock_compares_networks_that_take_turns(monkeypatch):
    """Where each pass is slower than the one before, as on a machine that gets busy, the share is as it was."""
    small, large = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    now, passes = [0.0], []

    def slow(model, seconds):
        def hook(*_):
            passes.append(model)
            now[0] += seconds * 1.01 ** len(passes)

        model.register_forward_hook(hook)

    slow(small, 0.01), slow(large, 0.02)
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: now[0])
    assert budgets.share_of_time(small, large, torch.zeros(2, 4)) == pytest.approx(0.5, rel=0.02)
    assert passes[:4] == [small, large, small, large]


def test_bad_targets_are_one_line():
    model, x = Residual().eval(), images(8)
    for settings, says in (
        ({"target_macs": 1.5}, "target_macs 1.5"),
        ({"target_latency": 0}, "target_latency 0: give the share that may stay"),
        ({"target_macs": 0.5, "target_latency": 0.5}, "one of"),
        ({"target_macs": 0.5, "target_parameters": 0.5}, "one of"),
        ({"target_macs": 0.5, "widths": [8, 8]}, "one of"),
        ({"target_parameters": 0.01}, "can't bring"),
        ({"target_macs": 0.4, "round_to": 16}, "can't bring .* by multiples of 16"),
        ({"round_to": 0}, "round_to 0: give a whole number from 1"),
    ):
        with pytest.raises(InputError, match=says):
            compress(model, x[:1], "prune", calibration=x, **settings)
    with pytest.raises(InputError, match="target_macs looks at images"):
        compress(model, x[:1], "prune", target_macs=0.5)


def test_round_to_is_the_nearest_multiple_within_the_site():
    """Of 20 channels: at least one multiple, the nearer, the larger of two, and never more than there are."""
    (site,) = trace(nn.Sequential(conv(3, 20), nn.ReLU(), conv(20, 5)), torch.zeros(IMAGE)).sites
    wanted = {0: 8, 1: 8, 8: 8, 11: 8, 12: 16, 19: 16, 20: 20}
    assert {count: multiple(site, count, 8) for count in wanted} == wanted
    assert multiple(site, 7, 64) == 20, "no multiple fits"
    assert [multiple(site, count) for count in (1, 7, 20)] == [1, 7, 20]


def test_round_to_holds_the_quota_of_groups_and_counts_the_channels_of_heads():
    (grouped,) = trace(nn.Sequential(conv(3, 48), nn.ReLU(), conv(48, 6, groups=3)), torch.zeros(IMAGE)).sites
    assert (grouped.step, multiple(grouped, 20, 8), multiple(grouped, 40, 8)) == (3, 24, 48)
    (heads,) = trace(Attention(24, 6, 4, True), torch.zeros(1, 5, 24)).sites
    assert [multiple(heads, count, 8) for count in (1, 3, 5)] == [2, 4, 6]
    assert compress(Attention(24, 6, 4, True), torch.zeros(1, 5, 24), "prune", round_to=8, ratio=0.5).model.heads == 4


@pytest.mark.parametrize("scope", ["hidden", "all"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.99])
def test_all_widths_are_multiples_and_nothing_removed_stays_nothing(ratio, scope):
    model, x = random_network("resnet20", 10, (3, 16, 16)), torch.randn(4, 3, 16, 16)
    result = compress(model, x[:1], "merge", ratio=ratio, round_to=8, scope=scope)
    assert all(width % 8 == 0 for width in result.report.widths.values())
    assert {len(keep) for keep in result.keep.values()} == set(result.report.widths.values())
    if not ratio:
        assert torch.equal(model(x), result.model(x))
        for name, value in model.state_dict().items():
            assert torch.equal(value, result.model.state_dict()[name])


def test_widths_that_are_named_stay_as_given():
    result = compress(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 2)), torch.zeros(IMAGE),
                      widths={"0": 5}, ratio=0.4, round_to=8)  # fmt: skip
    assert result.report.widths == {"0": 5, "2": 8}


@pytest.mark.parametrize("what", ["parameters", "macs"])
@pytest.mark.parametrize("share", [0.45, 0.8])
def test_a_target_is_met_with_multiples(what, share):
    model = lively(Residual())
    x = images(128)
    result = compress(model, x[:1], "prune", calibration=x, round_to=4, **{f"target_{what}": share})
    before, after = (getattr(cost(network, x[:1]), what) for network in (model, result.model))
    assert share - 0.25 < after / before <= share
    assert all(width % 4 == 0 for width in result.report.widths.values())
