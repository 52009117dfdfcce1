"""The criterion `output`: backward elimination, its costs, and the choice on held-out images."""

import re

import pytest
import torch
from torch import nn

from nm_lightning import compress, trace
from nm_lightning.compression.selection import output_aware
from nm_lightning.compression.selection.output_aware import costs_of, eliminate, watch


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


@pytest.mark.parametrize("winner", ["output", "l2-norm"])
def test_the_better_choice_on_held_out_images_is_taken(winner):
    """One of three neurons is the others' sum, a fourth says little: to drop the sum is free, if others learn of it.

    Reconstruct is shown the first half of the images. Where these leave the three silent, it can't make up for the sum.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 3, 0], [0, 0, 0.3]]))
    x = torch.randn(128, 3)
    if winner == "l2-norm":
        x[:64, :2] = 0
    result = compress(model, x[:1], "reconstruct", "output", widths=[3], calibration=x)
    by_norm = result.keep["0"].tolist() == [0, 1, 2]
    assert by_norm == (winner == "l2-norm")
    (remark,) = result.report.notes
    assert remark.startswith(f"criterion {winner}: nearest to the original on held-out images (output ")
    of_output, of_norm = map(float, re.findall(r"(?:output|l2-norm) ([\d.e-]+)", remark.split("(")[1]))
    assert (of_norm < of_output) == by_norm
    assert compress(model, x[:1], "prune", "output", widths=[3], calibration=x).keep["0"].tolist() != [0, 1, 2]


def chooser(last: float) -> tuple[nn.Module, torch.Tensor]:
    """Four neurons, one the sum of two others, one weak, that the outputs read with weight `last`; and images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 3, 0], [0, 0, 0.3]]))
        model[2].weight[:, 3] = last * torch.tensor([1.0, -1.0, 0.5])
    return model, torch.randn(128, 3)


@pytest.mark.parametrize(("last", "survivors"), [(0.1, [0, 1, 2]), (20.0, "output")])
def test_by_default_output_is_looked_at_where_the_norm_loses_much(last, survivors):
    """The weak neuron goes where little depends on it, and nothing more is looked at; else the sum goes."""
    model, x = chooser(last)
    result = compress(model, x[:1], "reconstruct", widths=[3], calibration=x)
    if survivors == "output":
        assert 3 in result.keep["0"]
        assert result.report.notes[0].startswith("criterion output: nearest")
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), model(x), rtol=1e-2, atol=1e-2)
    else:
        assert result.keep["0"].tolist() == survivors
        assert not result.report.notes
    assert result.recipe.criterion.name == "auto"
    again = compress(model, x[:1], recipe=result.recipe, calibration=x)
    assert all(torch.equal(value, result.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_by_default_the_norm_chooses_where_output_can_not_look():
    """Inputs that are whole numbers have no gradients; images that are matched to nothing tell nothing."""
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        words[4].weight.mul_(20)
    x = torch.randint(0, 9, (64, 3))
    (remark,) = compress(words, x[:1], "reconstruct", ratio=0.7, calibration=x).report.notes
    assert (
        remark
        == "criterion l2-norm: criterion output and targets need gradients, the network's inputs are whole numbers"
    )
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    with torch.no_grad():
        model[3].weight.mul_(20)
    example = torch.zeros(1, 1, 8, 8)
    loose, norm = (
        compress(model, example, "reconstruct", criterion, ratio=0.7, calibration="synthetic", calibration_size=32)
        for criterion in ("auto", "l2-norm")
    )
    assert all(torch.equal(loose.keep[name], kept) for name, kept in norm.keep.items())


@pytest.mark.parametrize(("nats", "chosen"), [(0.5, "output"), (0.9, "l2-norm"), (1.1, "l2-norm")])
def test_on_drawn_images_only_a_clear_gain_counts(nats, chosen, monkeypatch):
    lost = iter([nats, 1.0])  # of output, of the norm
    monkeypatch.setattr(output_aware, "divergence", lambda *given: next(lost))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    settings = {"ratio": 0.5, "calibration": "synthetic", "calibration_size": 16, "calibration_steps": 1}
    result = compress(model, torch.zeros(1, 3, 8, 8), "reconstruct", "output", **settings)
    (remark,) = result.report.notes
    little = "output is little nearer" if nats < 1 else "nearest"
    assert remark.startswith(f"criterion {chosen}: {'nearest' if chosen == 'output' else little} to the original")
