"""Third room: what becomes of the removed neurons.

Prune and merge choose a scaling matrix `Z` of shape `(n, k)` with `h ~ Z h[keep]`: row `i` says how neuron `i`'s
output is made from the `k` kept ones. Source: Kim et al., "Neuron Merging: Compensating for Pruned Neurons",
NeurIPS 2020, algorithms 1 to 3. All of it is tensor code over a whole site; `reference.py` holds the literal loops.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def neuron_vectors(layer: nn.Module, with_bias: bool) -> Tensor:
    """Each neuron's weight vector `w_i`: `(n, d)` in float32, the bias appended where asked for and present."""
    vectors = layer.weight.detach().flatten(1).float()
    if with_bias and layer.bias is not None:
        vectors = torch.cat([vectors, layer.bias.detach().float()[:, None]], dim=1)
    return vectors


def norm_parameters(norm: nn.Module, channels: Tensor, layer: nn.Module) -> Norm:
    """A BatchNorm's parameters at the site's `channels` `(n,)`; `layer` produces them."""

    def at(values: Tensor | None, default: float) -> Tensor:
        if values is None:
            return torch.full((len(channels),), default, device=channels.device)
        return values.detach()[channels].float()

    mean = at(norm.running_mean, 0.0)
    if layer.bias is not None:
        mean = mean - layer.bias.detach().float()
    return Norm(at(norm.weight, 1.0), at(norm.bias, 0.0), mean, at(norm.running_var, 1.0), norm.eps)


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
    units = F.normalize(vectors, dim=1)
    cosine = units[removed] @ units[keep].T
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
