"""The narrow network: an ordinary one, and apart from the wide one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress
from tests.networks import conv

IMAGE = (2, 3, 8, 8)


def test_hooks_modes_types_and_gradients_are_kept():
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 4)).to(torch.bfloat16)
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(1))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    narrow = compress(model, torch.zeros(IMAGE), ratio=0.5).model
    assert narrow(torch.zeros(IMAGE, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert calls
    assert [module.training for module in narrow] == [True, False, True, True]
    assert not narrow[0].weight.requires_grad
    assert narrow[3].weight.requires_grad
    double = compress(model.double(), torch.zeros(IMAGE), ratio=0.5).model
    assert double[3].weight.dtype == torch.float64
    trained = copy.deepcopy(double).train()
    trained(torch.randn(IMAGE).double()).sum().backward()
    assert trained[3].weight.grad.shape == (4, 6, 3, 3)


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_the_result_shares_no_memory_with_the_input(ratio):
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 4))
    before = copy.deepcopy(model.state_dict())
    narrow = compress(model, torch.zeros(IMAGE), "merge", ratio=ratio, threshold=0).model
    with torch.no_grad():
        for tensor in narrow.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(),
                          nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3))  # fmt: skip
    model[4].weight = model[2].weight
    x = torch.randn(4, 6)
    narrow = compress(model, x, ratio=0.5, scope="all").model
    assert narrow[4].weight is narrow[2].weight
    assert narrow[2].weight.shape == (6, 6)
    assert narrow(x).shape == (4, 3)


def test_auxiliary_heads_are_sliced_too():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.fc = conv(3, 12), conv(12, 5), conv(12, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    narrow = compress(WithAuxiliary().eval(), torch.zeros(IMAGE), ratio=0.5).model
    outputs = narrow.train()(torch.zeros(IMAGE))
    assert [output.shape[1] for output in outputs] == [4, 5]
