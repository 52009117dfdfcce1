"""How many neurons stay: widths of groups, and targets met where it costs least."""

import pytest
import torch
from torch import nn

from nm_lightning import InputError, compress
from nm_lightning.compression import cost
from tests.networks import Residual, conv, images, lively

IMAGE = (2, 3, 8, 8)


def test_widths_of_groups_are_multiples():
    model = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4))
    with pytest.raises(InputError, match="multiple of 4"):
        compress(model, torch.zeros(IMAGE), widths={"0": 6})
    assert compress(model, torch.zeros(IMAGE), ratio=0.99).model[0].out_channels == 4


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
