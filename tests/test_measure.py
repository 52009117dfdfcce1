"""Before and after: each test image counts once, on however many ranks."""

import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler

from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.measure import dealt


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
