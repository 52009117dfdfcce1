"""Fold: clusters of neurons become their mean (Model Folding, Wang et al., ICLR 2025; without its repair)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_lightning.compression.settings import Method
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import Decomposition, Scaling
from nm_lightning.compression.structure.vectors import neuron_vectors


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

    >>> cluster(torch.tensor([[0.0], [5.0], [0.1], [5.2]]), 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    from sklearn.cluster import KMeans  # it takes as long as torch to import

    distinct = len(vectors.unique(dim=0))
    if distinct < width:  # k-means wants as many points as clusters
        vectors = torch.cat([vectors, torch.arange(len(vectors)).to(vectors)[:, None] * 1e-6], dim=1)
    means = KMeans(width, n_init=3, random_state=seed)
    return torch.from_numpy(means.fit_predict(vectors.double().cpu().numpy())).long()
