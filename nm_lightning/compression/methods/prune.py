"""Prune: the removed neurons are dropped."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nm_lightning.compression.settings import Method
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import Decomposition


@dataclass(frozen=True)
class Prune(Method):
    """Drops neurons."""

    name = "prune"

    def decompose(self, subject: Subject, keeps: Mapping[str, Tensor]) -> Decomposition:
        """Nothing but the survivors."""
        return Decomposition.pruned(subject.sites, keeps)
