"""Merge: each removed neuron goes, scaled, to its most similar survivor.

A scaling matrix `Z` of shape `(n, k)` with `h ~ Z h[keep]`: row `i` says how neuron `i`'s output is made from the `k`
kept ones. Source: Kim et al., "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020, algorithms 1 to 3. All
of it is tensor code over a whole site; `reference.py` holds the literal loops.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nm_lightning.compression.methods import reference
from nm_lightning.compression.report import SiteReport
from nm_lightning.compression.settings import Method, Values, choice, is_number, number, setting
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import Decomposition, Scaling, absorb
from nm_lightning.compression.structure.sites import Consumer, Site
from nm_lightning.compression.structure.vectors import Norm, neuron_vectors, norm_parameters


@dataclass(frozen=True)
class Merge(Method):
    """Folds each removed neuron, scaled, into its most similar survivor (Kim et al., NeurIPS 2020).

    Where a scaled neuron would not arrive scaled at a consumer, it is pruned there, and the report says why.
    """

    name = "merge"
    threshold: float | None = setting(
        0.1,
        "least cosine similarity of a merged pair; 0 switches the test off",
        Values("a number from 0 to 1", lambda value: value is None or (is_number(value) and 0 <= value <= 1)),
        auto=True,
    )
    lamda: float = setting(
        0.85,
        "weight of the cosine distance against the bias distance, where a BatchNorm follows",
        number(0, 1),
        auto=True,
    )
    formulation: str = setting(
        "published", "published, textbook or consistent", choice("published", "textbook", "consistent")
    )
    implementation: str = setting("fast", "fast, or reference for the paper's loops", choice("fast", "reference"))

    def decompose(self, subject: Subject, keeps: Mapping[str, Tensor]) -> Decomposition:
        """A scaling matrix for each consumer that a scaled neuron reaches."""
        found = Decomposition.pruned(subject.sites, keeps, self.name)
        multiply = absorb if self.implementation == "fast" else reference.absorb
        for site, row, keep in found.shrinking(subject.sites):
            matrices: dict[tuple, Tensor] = {}
            for consumer in site.consumers:
                obstacle = _obstacle(site, consumer, subject)
                if obstacle:
                    row.note = f"pruned, not merged: {obstacle}"
                    continue
                key = (consumer.norm, consumer.name if consumer.groups > 1 else "")
                if key not in matrices:
                    matrices[key] = self.matrix(site, consumer, keep, subject)
                found.scalings.append(Scaling(consumer, keep, matrices[key], multiply))
            if not site.consumers:
                row.note = "pruned, not merged: no layer reads its neurons, which are multiplied by each other"
            _count(row, matrices, keep)
        return found

    def matrix(self, site: Site, consumer: Consumer, keep: Tensor, subject: Subject) -> Tensor:
        """`Z` `(n, k)` on the way to a consumer, by the tensor code or by the paper's loops."""
        producer, tensors = site.producers[0], subject.tensors
        vectors, norm = neuron_vectors(producer, tensors, with_bias=consumer.norm is None), None
        if consumer.norm:
            member = next(member for member in site.passed if member.name == consumer.norm)
            norm = norm_parameters(member, producer, tensors, subject.layers[consumer.norm].eps)
        groups = None
        if consumer.groups > 1:
            groups = consumer.positions()[:, 0] // (len(consumer.owner) // consumer.groups)
            groups = groups.to(vectors.device)
        threshold, lamda, formulation = self.threshold, self.lamda, self.formulation
        if self.implementation == "fast" or groups is not None:
            return scaling_matrix(vectors, keep.to(vectors.device), threshold, norm, lamda, formulation, groups)
        if norm is None:
            return reference.most_similar(vectors, keep, threshold)
        return reference.most_similar_normalised(vectors, keep, threshold, norm, lamda, formulation)


def _obstacle(site: Site, consumer: Consumer, subject: Subject) -> str:
    """Why a scaled neuron would not arrive scaled, or has no one vector; empty if merging is valid here."""
    if consumer.obstacle:
        return consumer.obstacle
    if len(site.producers) > 1:
        return f"{', '.join(member.name for member in site.producers)} make it together"
    if not all(member.even(site.width) for member in [site.producers[0], *site.passed, *site.consumers]):
        return "some of its neurons are read more often than others"
    if site.producers[0].positions().shape[1] > 1:
        return f"a neuron is several rows of {site.name}"
    if consumer.norm and subject.layers[consumer.norm].running_mean is None:
        return f"{consumer.norm} keeps no running statistics"
    if consumer.groups > 1 and consumer.positions().shape[1] > 1:
        return f"a neuron is several columns of the grouped {consumer.name}"
    return ""


def _count(row: SiteReport, matrices: Mapping[tuple, Tensor], keep: Tensor) -> None:
    row.merged = max((int((matrix != 0).any(dim=1).sum()) - len(keep) for matrix in matrices.values()), default=0)
    row.negative = sum(int((matrix < 0).sum()) for matrix in matrices.values())
    if row.note and not matrices:
        row.method = "prune"


def one_hot(neurons: int, keep: Tensor) -> Tensor:
    """The scaling matrix of pruning: kept rows one-hot, removed rows zero. `(neurons, k)`.

    >>> one_hot(3, torch.tensor([0, 2]))
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]])
    """
    scaling = torch.zeros(neurons, len(keep), device=keep.device)
    scaling[keep, torch.arange(len(keep), device=keep.device)] = 1
    return scaling


def scaling_matrix(
    vectors: Tensor,
    keep: Tensor,
    threshold: float | None,
    norm: Norm | None = None,
    lamda: float = 0.85,
    formulation: str = "published",
    groups: Tensor | None = None,
) -> Tensor:
    """The scaling matrix of merging: each removed neuron goes, scaled, to one kept neuron.

    Args:
        vectors: `(n, d)`, the neurons' weight vectors.
        keep: `(k,)`, the survivors in ascending order.
        threshold: least cosine similarity of a pair; below it the removed neuron is pruned. 0 or None: no test.
        norm: the BatchNorm behind the layer, if any (algorithm 3; without it algorithm 2).
        lamda: weight of the cosine distance against the bias distance; only with a norm.
        formulation: `published` (the running variance as scale, the published ratios), `textbook` (the standard
            deviation, the published ratios) or `consistent` (the ratios that `h_i ~ S h_p` demands, and no negative
            scale, which ReLU would not pass).
        groups: `(n,)`, the group of each neuron in a grouped convolution that reads it; pairs stay within. None: one.

    Returns:
        `Z` of shape `(n, k)` in float32.
    """
    scaling = one_hot(len(vectors), keep)
    removed = torch.ones(len(vectors), dtype=torch.bool, device=keep.device)
    removed[keep] = False
    removed = removed.nonzero().squeeze(1)
    if not len(removed):
        return scaling

    lengths = vectors.norm(dim=1)
    kept = F.normalize(vectors[keep], dim=1)
    cosine = torch.cat([F.normalize(vectors[part], dim=1) @ kept.T for part in removed.split(1024)])  # saves memory
    ratio = lengths[removed, None] / lengths[keep]
    if norm is None:
        cost, scales = -cosine, ratio
        cost = cost.masked_fill(~ratio.isfinite(), torch.inf)
    else:
        scales, bias_distance = norm_terms(norm, removed, keep, ratio, formulation)
        valid = scales.isfinite() & bias_distance.isfinite()
        if formulation == "consistent":
            valid &= scales >= 0
        cost = lamda * (1 - cosine) + (1 - lamda) * _min_max(bias_distance, valid)
        cost = cost.masked_fill(~valid, torch.inf)

    if groups is not None:
        cost = cost.masked_fill(groups[removed, None] != groups[keep], torch.inf)
    rows = torch.arange(len(removed), device=keep.device)
    partner = cost.argmin(dim=1)
    merged = cost[rows, partner].isfinite()
    if threshold:
        merged &= cosine[rows, partner] >= threshold
    scaling[removed[merged], partner[merged]] = scales[rows, partner][merged]
    return scaling


def norm_terms(norm: Norm, removed: Tensor, keep: Tensor, ratio: Tensor, formulation: str) -> tuple[Tensor, Tensor]:
    """The scale term S and the bias distance B of every pair, both `(removed, kept)`.

    A norm weight of zero makes them infinite or undefined; the caller leaves such pairs out.
    """
    scale = norm.scale(formulation)
    g_i, b_i, m_i, s_i = (values[removed, None] for values in (norm.weight, norm.bias, norm.mean, scale))
    g_p, b_p, m_p, s_p = (values[keep] for values in (norm.weight, norm.bias, norm.mean, scale))
    if formulation == "consistent":
        scales = ratio * (g_i / g_p) * (s_p / s_i)
        return scales, ((g_i / s_i) * (ratio * (m_p - s_p * b_p / g_p) - m_i) + b_i).abs()
    scales = ratio * (g_p / g_i) * (s_i / s_p)
    return scales, ((g_p / s_p) * (ratio * (m_i - s_i * b_i / g_i) - m_p) + b_p).abs() / scales


def _min_max(values: Tensor, valid: Tensor) -> Tensor:
    """Each row scaled to [0, 1] over its valid entries; 0 where they are all equal, so that cosine decides."""
    low = values.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    span = values.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True) - low
    return torch.where(span > 0, (values - low) / span, 0.0)
