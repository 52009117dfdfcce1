"""Third room: what becomes of the removed neurons.

Prune and merge choose a scaling matrix `Z` of shape `(n, k)` with `h ~ Z h[keep]`: row `i` says how neuron `i`'s
output is made from the `k` kept ones. Source: Kim et al., "Neuron Merging: Compensating for Pruned Neurons",
NeurIPS 2020, algorithms 1 to 3. All of it is tensor code over a whole site; `reference.py` holds the literal loops.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from nm_lightning.compression.sites import Member

FORMULATIONS = ("published", "textbook", "consistent")


@dataclass(frozen=True)
class Norm:
    """A BatchNorm's parameters for the `n` neurons of a site, each `(n,)` in float32.

    Attributes:
        weight: g.
        bias: b.
        mean: m, less the bias of the layer before it.
        variance: the running variance, as stored.
        eps: the norm's epsilon.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    def scale(self, formulation: str) -> Tensor:
        """The scale s: the running variance itself as published, else the standard deviation."""
        return self.variance if formulation == "published" else torch.sqrt(self.variance + self.eps)


def neuron_vectors(member: Member, tensors: Mapping[str, Tensor], with_bias: bool) -> Tensor:
    """Each neuron's weight vector `w_i`: `(n, d)` in float32, the bias appended where asked for and present.

    Args:
        member: a producer.
        tensors: the network's, by name.
        with_bias: whether a bias belongs to the vector.
    """
    (weight, dim), *others = member.slots
    positions, rows = member.positions(), tensors[weight].detach().movedim(dim, 0)
    as_they_lie = torch.equal(positions[:, 0], torch.arange(len(rows)))  # nothing to gather
    parts = [(rows if as_they_lie else rows[positions]).flatten(1)]
    parts += [tensors[bias].detach()[positions] for bias, _ in others if with_bias]
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).float()


def norm_parameters(norm: Member, producer: Member, tensors: Mapping[str, Tensor], eps: float) -> Norm:
    """A BatchNorm's parameters at the site's neurons; `producer` is the layer before it, whose bias it subtracts."""
    values = {name.rpartition(".")[2]: tensors[name].detach() for name, _ in norm.slots}
    channels = norm.positions()[:, 0]
    mean, variance = values["running_mean"][channels].float(), values["running_var"][channels].float()
    weight = values["weight"][channels].float() if "weight" in values else torch.ones_like(mean)
    shift = values["bias"][channels].float() if "bias" in values else torch.zeros_like(mean)
    for bias, _ in producer.slots[1:]:
        mean = mean - tensors[bias].detach()[producer.positions()[:, 0]].float()
    return Norm(weight, shift, mean, variance, eps)


def prune(neurons: int, keep: Tensor) -> Tensor:
    """The scaling matrix of pruning: kept rows one-hot, removed rows zero. `(neurons, k)`.

    >>> prune(3, torch.tensor([0, 2]))
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]])
    """
    scaling = torch.zeros(neurons, len(keep), device=keep.device)
    scaling[keep, torch.arange(len(keep), device=keep.device)] = 1
    return scaling


def merge(
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
    scaling = prune(len(vectors), keep)
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


def cluster(vectors: Tensor, width: int, seed: int = 0) -> Tensor:
    """K-means over a site's neurons: the cluster `(n,)` of each, `width` of them (Model Folding, ICLR 2025).

    >>> cluster(torch.tensor([[0.0], [5.0], [0.1], [5.2]]), 2).tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    True
    """
    distinct = len(vectors.unique(dim=0))
    if distinct < width:  # k-means wants as many points as clusters
        vectors = torch.cat([vectors, torch.arange(len(vectors)).to(vectors)[:, None] * 1e-6], dim=1)
    means = KMeans(width, n_init=3, random_state=seed)
    return torch.from_numpy(means.fit_predict(vectors.double().cpu().numpy())).long()


def channel_map(gram: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """The ridge map from the survivors to all neurons, `(n, k)`: `G[:, keep] (G[keep, keep] + r I)^-1`.

    One map for all consumers, from the neurons' Gram matrix `(n, n)` (GRAIL, CPAL 2026).

    >>> channel_map(torch.eye(3).double(), torch.tensor([0, 2]), 0.0)
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]])
    """
    gram = gram.double()
    inner = gram[keep][:, keep]
    inner = inner + torch.eye(len(keep), dtype=gram.dtype, device=gram.device) * (
        ridge * inner.diagonal().mean() + torch.finfo(gram.dtype).tiny
    )
    return torch.linalg.solve(inner, gram[keep]).T.float()


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
