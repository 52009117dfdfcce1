"""Which neurons stay, by their weights alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nm_lightning.compression.settings import Criterion
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.sites import Member, Site
from nm_lightning.compression.structure.vectors import vectors_in_parts

AT_ONCE = 2**20


@dataclass(frozen=True)
class WeightCriterion(Criterion):
    """Ranks neurons by their weight vectors."""

    alone: ClassVar[bool] = True  # whether a neuron's score is that of its own vector

    def score(self, vectors: Tensor) -> Tensor:
        """How much each neuron should stay: `(n, d)` to `(n,)`."""
        raise NotImplementedError

    def scores(self, site: Site, subject: Subject) -> Tensor:
        """The site's scores; where several layers are added, each has an equal say."""
        with_bias = not any(consumer.norm for consumer in site.consumers)  # a norm would subtract it again
        if not site.coupled and site.producers[0].even(site.width):
            return self._of(site.producers[0], subject, with_bias)
        total = torch.zeros(site.width)
        for producer in site.producers:
            rows = torch.arange(len(producer.owner))
            each = self._of(replace(producer, owner=rows), subject, with_bias).cpu().float()
            owned = producer.owner >= 0
            total.index_add_(0, producer.owner[owned], each[owned] / each.mean().clamp(min=1e-30))
        return total

    def _of(self, producer: Member, subject: Subject, with_bias: bool) -> Tensor:
        """The scores of what a layer makes, `AT_ONCE` weights at a time where that is possible: memory is slow."""
        count, width = len(producer.owner), subject.tensors[producer.slots[0][0]].numel() // len(producer.owner)
        step = max(1, AT_ONCE // width) if self.alone else count
        return torch.cat([*map(self.score, vectors_in_parts(producer, subject.tensors, with_bias, step))])


class L1Norm(WeightCriterion):
    """The largest sums of absolute weights stay (Li et al., ICLR 2017)."""

    name = "l1-norm"

    def score(self, vectors: Tensor) -> Tensor:
        """`(n, d)` to `(n,)`."""
        return vectors.abs().sum(dim=1)


class L2Norm(WeightCriterion):
    """The largest Euclidean norms stay (He et al., IJCAI 2018)."""

    name = "l2-norm"

    def score(self, vectors: Tensor) -> Tensor:
        """`(n, d)` to `(n,)`."""
        return vectors.norm(dim=1)


class GeometricMedian(WeightCriterion):
    """The largest sums of Euclidean distances to all others stay (FPGM, He et al., CVPR 2019).

    Neurons near the geometric median have small sums: the others can stand in for them.
    """

    name = "l2-GM"
    alone = False

    def score(self, vectors: Tensor) -> Tensor:
        """`(n, d)` to `(n,)`."""
        return torch.cdist(vectors.double(), vectors.double()).sum(dim=1)
