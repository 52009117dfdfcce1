"""Facts about the precision that a timed step chooses."""

import pytest
import torch
from torch import nn

from nm_lightning.cli import precision


@pytest.mark.parametrize(
    ("full", "mixed", "chosen"), [(2.0, 1.0, "bf16-mixed"), (1.0, 1.0, "32-true"), (1.0, 2.0, "32-true")]
)
def test_the_faster_one_is_taken_and_the_network_left_alone(monkeypatch, full, mixed, chosen):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10))
    images = torch.rand(5, 3, 8, 8)
    before, state = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    seconds = iter([full, mixed])
    monkeypatch.setattr(precision, "_seconds", lambda once: once() or next(seconds))
    found, line = precision.faster(network, images, "cpu")
    assert found == chosen
    assert chosen in line
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
