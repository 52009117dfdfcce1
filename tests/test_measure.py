"""Before and after: each test image counts once, on however many ranks."""

from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch import nn
from torch.utils.data import BatchSampler

from nm_lightning import measure
from nm_lightning.compression import Recipe, SiteReport
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.measure import Baseline, Latency, Result, dealt, odd_widths


def test_each_sampler_is_dealt_whole():
    """Shuffled, a part, or wrapped by Lightning: over all ranks each index comes once."""

    class Two:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

        def broadcast(self, value):
            return first  # what rank 0 has drawn

    data = torch.utils.data.TensorDataset(torch.arange(21))
    part = torch.utils.data.SubsetRandomSampler(range(5, 18))
    wrapped = DistributedSamplerWrapper(part, num_replicas=2, rank=0)
    for sampler, wanted in ((None, range(21)), (part, range(5, 18)), (wrapped, range(5, 18))):
        loader = torch.utils.data.DataLoader(data, 4, sampler=sampler)
        own = BatchSampler(getattr(getattr(sampler, "dataset", None), "_sampler", loader.sampler), 4, False)
        first = list(own)
        seen = [int(x) for rank in (0, 1) for (batch,) in dealt(loader, Ranks(Two(rank))) for x in batch]
        assert sorted(seen) == list(wanted)


@pytest.mark.parametrize(
    ("settings", "before", "after", "time", "layer", "said"),
    [
        ({}, 16, 11, 1.06, nn.Conv2d(3, 16, 3), True),
        ({}, 16, 11, 0.75, nn.Conv2d(3, 16, 3), False),  # time has gone with the work
        ({}, 16, 8, 1.06, nn.Conv2d(3, 16, 3), False),
        ({}, 20, 11, 1.06, nn.Conv2d(3, 20, 3), False),  # it was odd before
        ({}, 16, 16, 1.06, nn.Conv2d(3, 16, 3), False),
        ({}, 16, 11, 1.06, nn.Linear(3, 16), False),
        ({"round_to": 4}, 16, 11, 1.06, nn.Conv2d(3, 16, 3), False),
        ({"widths": [11]}, 16, 11, 1.06, nn.Conv2d(3, 16, 3), False),
    ],
)
def test_odd_widths_are_noted_where_they_seem_to_cost_time(settings, before, after, time, layer, said):
    """Once, at the row where the time that is left exceeds the MACs' share by most."""
    baseline = Baseline(0.9, 100, 100, [Latency(1, 2.0, 2.0, 2.0), Latency(128, 1.0, 1.0, 1.0)])

    def row(ratio, time):
        recipe = Recipe.of("prune", **settings).to_dict()
        return Result("prune", "l2-norm", ratio, recipe, 0.9, 70, 69, 0.1, {}, [], "", "", 0.3,
                      [SiteReport("0", before, after, "prune")],
                      latency=[Latency(1, 2.0 * 0.7, 0, 0), Latency(128, time, 0, 0)])  # fmt: skip

    rows = [row(0.3, time), row(0.4, time - 0.01)]
    odd_widths(baseline, rows, nn.Sequential(layer))
    assert rows[1].notes == []
    assert rows[0].notes == said * [
        "prune, l2-norm, 0.3 takes 106 % of the time with 69 % of the MACs, 128 at once: most convolutions have no "
        "multiple of 8 channels now, --round_to 8 may be faster"
    ]


@pytest.mark.parametrize("views", [False, True])
def test_either_layout_predicts_the_same(monkeypatch, views):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, images):
            if views:  # which a layout with the channels last does not allow
                images = images.view(len(images), -1).view(images.shape)
            return self.fc(self.conv(images).relu().mean((2, 3)))

    torch.manual_seed(0)
    network, images = Network().eval(), torch.randn(64, 3, 9, 9)
    batches = [(part, network(part).argmax(1)) for part in images.split(32)]
    clock = SimpleNamespace(perf_counter=iter([0, 2, 2, 3] * 4).__next__)  # the channels last are faster
    monkeypatch.setattr(measure, "time", clock)
    assert measure.faster_layout(network, images) is (torch.contiguous_format if views else torch.channels_last)
    assert measure.share_right(network, batches) == 1
    assert network.conv.weight.is_contiguous()
