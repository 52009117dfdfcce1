"""Several processes that compress together: each has its share of the images, all end with the same network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.inputs import Inputs, length, tensors_in
from nm_lightning.errors import RankLost


class Ranks:
    """What the processes of a Lightning strategy do together; a process alone does nothing here.

    Args:
        strategy: of a `Trainer` or a `Fabric` that has been launched; None for one process.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    def __init__(self, strategy: Any = None):
        self.strategy = strategy
        self.rank: int = getattr(strategy, "global_rank", 0)
        self.size: int = getattr(strategy, "world_size", 1)

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor's sum over all ranks, the same to the bit on each.

        Raises:
            RankLost: another rank is gone.
        """
        if self.size == 1:
            return list(tensors)
        reduce = getattr(self.strategy, "reduce", None) or self.strategy.all_reduce  # Trainer's, Fabric's
        try:
            return [reduce(tensor.clone().contiguous(), reduce_op="sum") for tensor in tensors]
        except RuntimeError as error:
            raise RankLost(error) from error

    def images(self, batches: Sequence[Inputs]) -> int:
        """How many images all ranks' batches have."""
        (count,) = self.total(torch.tensor(sum(map(length, batches)), device=tensors_in(batches[0])[0].device))
        return int(count)

    def first(self, value: Any) -> Any:
        """What rank 0 has: tensors on the CPU, or containers of them.

        Raises:
            RankLost: another rank is gone.
        """
        if self.size == 1:
            return value
        try:
            return self.strategy.broadcast(value)
        except RuntimeError as error:
            raise RankLost(error) from error

    def agree(self, model: nn.Module) -> None:
        """Give a network rank 0's state dict, in place."""
        if self.size > 1:
            state = {}
            if self.rank == 0:
                state = {name: value.cpu() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
            with torch.no_grad():
                model.load_state_dict(self.first(state), strict=False)


ALONE = Ranks()
