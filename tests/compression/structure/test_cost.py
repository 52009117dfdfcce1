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


def test_attention_that_runs_as_one_operation_is_counted():
    """By hand: four maps of 16 to 16 for 5 tokens; queries by keys, and weights by values, 5 times 5 times 16 each."""
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    assert cost(net, torch.zeros(1, 5, 16)).macs == 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled()
