"""The criterion `output`: backward elimination, its costs, and the choice on held-out images."""

import re

import pytest
import torch
from torch import nn

from nm_lightning import compress, trace
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
