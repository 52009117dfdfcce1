"""The network that is to be compressed, with all that selection, methods and refinements may ask of it."""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.adapted import adapted
from nm_lightning.compression.statistics.calibration import Calibration
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.structure.copies import evaluated
from nm_lightning.compression.structure.inputs import Inputs, first, mapped, to
from nm_lightning.compression.structure.plan import named_tensors
from nm_lightning.compression.structure.sites import Site

T = TypeVar("T")


@dataclass
class Subject:
    """A network, its sites and its calibration images; what was computed of them once is kept for whoever asks again.

    Attributes:
        model: the network, its weights plain tensors; it is only read.
        example: a batch that it accepts.
        sites: those to compress.
        calibration: its images.
        seed: of whatever is drawn.
        training: all training images, in batches that are drawn and augmented anew each time, if there are any.
        remarks: what a reader of the result should know; whoever finds something adds to them.
        computed: by key, what was computed.
    """

    model: nn.Module
    example: Inputs
    sites: Sequence[Site]
    calibration: Calibration
    seed: int = 0
    training: Iterable | None = None
    remarks: list[str] = field(default_factory=list)
    computed: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @property
    def batches(self) -> list[Inputs]:
        """This rank's calibration images."""
        return self.calibration.batches

    @property
    def ranks(self) -> Ranks:
        """The processes that compress together."""
        return self.calibration.ranks

    def inputs(self, count: int) -> Inputs:
        """A few calibration images where some are in memory; else drawn inputs, or the example's whole numbers."""
        if self.calibration.gathered:
            return first(self.batches[0], count)
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return torch.randn(tensor.shape, generator=generator).to(tensor.device)

        dtypes = {own.dtype for own in self.model.parameters() if own.is_floating_point()}
        return to(mapped(drawn, first(self.example, count)), dtype=torch.float64 if torch.float64 in dtypes else None)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters and buffers by name."""
        return named_tensors(self.model)

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The network's modules by name."""
        return dict(self.model.named_modules())

    @cached_property
    def evaluated(self) -> nn.Module:
        """A copy in evaluation mode, in at least float32."""
        return evaluated(self.model)

    @property
    def adapted(self) -> "Subject":
        """Itself with the network `adapted` to its images."""
        return self.once(
            "adapted", lambda: replace(self, model=adapted(self.model, self.batches, self.ranks), computed={})
        )

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed at the first call with this key."""
        if key not in self.computed:
            self.computed[key] = compute()
        return self.computed[key]

    def on(self, batches: Sequence[Inputs]) -> "Subject":
        """The same network with other images."""
        calibration = copy.copy(self.calibration)
        calibration.batches = list(batches)
        return replace(self, calibration=calibration, computed={}, remarks=[])
