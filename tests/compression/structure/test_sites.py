"""Which neurons of a site survive."""

import torch

from nm_lightning import compress
from tests.networks import Graph, conv

IMAGE = (2, 3, 8, 8)


def test_no_layer_loses_all_its_neurons():
    """A gate over a concatenation makes one site of several layers; each keeps at least one neuron."""
    model = Graph(lambda n, x: n.out((y := torch.cat([n.a(x), n.b(x)], 1)) * n.gate(y).sigmoid()),
                  a=conv(3, 12), b=conv(3, 2), gate=conv(14, 14), out=conv(14, 4))  # fmt: skip
    model.b.weight.data.zero_()
    model.b.bias.data.zero_()
    narrow = compress(model, torch.zeros(IMAGE), "prune", ratio=0.9, scope="all").model
    assert narrow.b.out_channels == 1
    assert narrow(torch.zeros(IMAGE)).shape == (2, 4, 8, 8)
