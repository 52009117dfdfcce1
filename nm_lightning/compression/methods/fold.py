"""Fold: clusters of neurons become their mean (Model Folding, Wang et al., ICLR 2025; without its repair)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from nm_lightning.compression.settings import Method
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import Decomposition, Scaling
from nm_lightning.compression.structure.vectors import neuron_vectors

STARTS, ITERATIONS = 3, 300  # of k-means


@dataclass(frozen=True)
class Fold(Method):
    """Averages clusters of neurons, found by k-means over each site (Model Folding, ICLR 2025).

    The criterion has no say. Means are taken of the weights, biases and norms' parameters as they are; a site of
    several producers, of grouped consumers or of cells is pruned.
    """

    name = "fold"

    def decompose(self, subject: Subject, keeps: Mapping[str, Tensor]) -> Decomposition:
        """The first of each cluster stands for it, with the cluster's mean in its rows and the sum in its columns."""
        found = Decomposition.pruned(subject.sites, keeps, self.name)
        for site, row, keep in found.shrinking(subject.sites):
            members = [site.producers[0], *site.passed, *site.consumers]
            alone = len(site.producers) == 1 and site.step == 1
            plain = alone and all(consumer.groups == 1 for consumer in site.consumers)
            if not plain or not all(member.even(site.width) for member in members):
                row.note = "pruned, not folded: several layers, groups or unequal shares make or read its neurons"
                row.method = "prune"
                continue
            vectors = neuron_vectors(site.producers[0], subject.tensors, with_bias=True)
            labels = cluster(vectors, len(keep), subject.seed)
            keep = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()]).sort().values
            found.keeps[site.name] = keep
            member_of = (labels[:, None] == labels[keep]).float()  # (n, k)
            row.merged = site.width - len(keep)
            for member in (site.producers[0], *site.passed):
                positions = member.positions()
                for name, dim in member.slots:
                    rows = found.tensors.get(name, subject.tensors[name]).detach().clone()
                    along = rows.movedim(dim, 0)
                    share = (member_of / member_of.sum(dim=0)).T.to(along)
                    mean = torch.tensordot(share, along[positions], dims=1)
                    along[positions[keep].flatten()] = mean.flatten(0, 1)
                    found.tensors[name] = rows
            found.scalings += [Scaling(consumer, keep, member_of) for consumer in site.consumers]
        return found


def cluster(vectors: Tensor, width: int, seed: int = 0) -> Tensor:
    """K-means over a site's neurons: the cluster `(n,)` of each, `width` of them (Model Folding, ICLR 2025).

    The best of three starts of scikit-learn's `KMeans`, with its draws and its rules, but on the neurons' products with
    each other `(n, n)`, which are computed once: no point is looked at again.

    >>> cluster(torch.tensor([[0.0], [5.0], [0.1], [5.2]]), 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    distinct = len(vectors.unique(dim=0))
    if distinct < width:  # k-means wants as many points as clusters
        vectors = torch.cat([vectors, torch.arange(len(vectors)).to(vectors)[:, None] * 1e-6], dim=1)
    points = vectors.double()
    points = points - points.mean(dim=0)
    gram, draws = points @ points.T, numpy.random.RandomState(seed)
    tolerance = 1e-4 * float(gram.trace()) / points.numel()
    found = [lloyd(gram, first_centres(gram, width, draws), tolerance) for _ in range(STARTS)]
    return min(found, key=lambda each: each[1])[0]


def first_centres(gram: Tensor, width: int, draws: numpy.random.RandomState) -> Tensor:
    """Points `(width,)` far from each other: k-means++, the best of some candidates each time (Arthur, 2007)."""
    square = gram.diagonal()
    trials = 2 + int(math.log(width))
    centres = [torch.tensor(min(int(draws.uniform() * len(gram)), len(gram) - 1), device=gram.device)]
    shares = torch.from_numpy(draws.uniform(size=(width - 1, trials))).to(gram.device)
    nearest = (square + square[centres[0]] - 2 * gram[centres[0]]).clamp(min=0)
    for share in shares:
        sums = nearest.cumsum(0)
        candidates = torch.searchsorted(sums, share * nearest.sum()).clamp(max=len(gram) - 1)
        to_each = (square + square[candidates, None] - 2 * gram[candidates]).clamp(min=0).minimum(nearest)
        best = to_each.sum(dim=1).argmin()
        nearest = to_each[best]
        centres.append(candidates[best])
    return torch.stack(centres)


def lloyd(gram: Tensor, centres: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Clusters `(n,)` from points as first centres, and the squared distances to their means; Lloyd's iterations."""
    every, width = torch.arange(len(gram), device=gram.device), len(centres)
    cross, own, before = gram[:, centres], gram.diagonal()[centres], None  # centres times points, and themselves
    for _ in range(ITERATIONS):
        far, labels = (own - 2 * cross).min(dim=1)
        counts = labels.bincount(minlength=width)
        members, empty = labels, (counts == 0).nonzero().flatten()
        if len(empty):  # the points that are farthest from their centres
            members = labels.clone()
            members[(gram.diagonal() + far).topk(len(empty)).indices] = empty
            counts = members.bincount(minlength=width)

        def means(cross: Tensor, members: Tensor = members, counts: Tensor = counts) -> Tensor:
            return gram.new_zeros(width).index_add_(0, members, cross[every, members]) / counts

        new = gram.new_zeros(len(gram), width).index_add_(1, members, gram) / counts
        moved, (own, cross) = own - 2 * means(cross), (means(new), new)
        if before is not None and torch.equal(labels, before):
            break
        before = labels
        if float((moved + own).sum()) <= tolerance:
            labels = (own - 2 * cross).argmin(dim=1)
            break
    return labels, float((gram.diagonal() + own[labels] - 2 * cross[every, labels]).sum())
