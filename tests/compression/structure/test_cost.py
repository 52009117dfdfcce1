"""Parameters and multiply-accumulates."""

import torch
from torch import nn

from nm_lightning.compression import cost


def test_the_cost_of_a_network_that_hands_a_parameter_to_a_layer():
    """Such as a class token; torch's counter expects everything that asks for a gradient to have one."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x) + self.fc(self.token)

    net = Token()
    assert cost(net, torch.zeros(3, 4)).macs == 16
    assert net.token.requires_grad and net.fc.weight.requires_grad


def test_the_cost_of_tied_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert cost(net, torch.zeros(1, 4)).macs == 32 and cost(net, torch.zeros(1, 4)).parameters == 16 + 8
