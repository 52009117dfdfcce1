"""Logits, where predictions are compared."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress


def test_logits_are_needed_where_predictions_are_compared():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return {"features": self.down(F.relu(self.up(x)))}

    model, x = Features(), torch.randn(50, 6)
    assert compress(model, x[:1], "reconstruct", ratio=0.5, calibration=x).report.widths == {"up": 6}
    for settings in ({"criterion": "output"}, {"target_macs": 0.5}, {"finetune": 1}):
        with pytest.raises(InputError, match="gives dict"):
            compress(model, x[:1], "reconstruct", calibration=x, **settings)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"criterion": "output"}, {"target_macs": 0.5}, {"finetune": 1}])
def test_logits_may_be_the_first_of_several_outputs(settings):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.down(F.relu(self.up(x))), x

    x = torch.randn(50, 6)
    logits, same = compress(Pair(), x[:1], "reconstruct", calibration=x, **settings).model(x)
    assert logits.shape == (50, 3) and same is x
