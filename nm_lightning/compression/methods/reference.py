"""The paper's algorithms as literal loops: the oracle of the tests, and `--implementation reference`.

Kim et al., "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020, algorithms 1 to 3. One neuron, one
candidate, one column at a time; nothing here is meant to be fast, and it shares no arithmetic with `merge.py`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nm_lightning.compression.structure.vectors import Norm


def most_similar(vectors: Tensor, keep: Tensor, threshold: float | None) -> Tensor:
    """Algorithm 2, a layer without BatchNorm: `(n, d)` vectors and `(k,)` survivors to `Z` `(n, k)`."""
    survivors = keep.tolist()
    scaling = torch.zeros(len(vectors), len(survivors))
    for i, vector in enumerate(vectors):
        if i in survivors:
            scaling[i, survivors.index(i)] = 1
            continue
        best, best_similarity = None, -math.inf
        for column, p in enumerate(survivors):
            similarity = float(F.cosine_similarity(vector, vectors[p], dim=0))
            if similarity > best_similarity and vectors[p].norm() > 0:
                best, best_similarity = column, similarity
        if best is None or (threshold and best_similarity < threshold):
            continue
        scaling[i, best] = vector.norm() / vectors[survivors[best]].norm()
    return scaling


def most_similar_normalised(
    vectors: Tensor, keep: Tensor, threshold: float | None, norm: Norm, lamda: float, formulation: str = "published"
) -> Tensor:
    """Algorithm 3, a layer with BatchNorm: `(n, d)` vectors and `(k,)` survivors to `Z` `(n, k)`."""
    survivors = keep.tolist()
    g, b, m = norm.weight, norm.bias, norm.mean
    s = norm.variance if formulation == "published" else torch.sqrt(norm.variance + norm.eps)
    scaling = torch.zeros(len(vectors), len(survivors))
    for i, vector in enumerate(vectors):
        if i in survivors:
            scaling[i, survivors.index(i)] = 1
            continue
        candidates = []  # (column, cosine distance, scale, bias distance)
        for column, p in enumerate(survivors):
            distance = 1 - F.cosine_similarity(vector, vectors[p], dim=0)
            r = vector.norm() / vectors[p].norm()
            if formulation == "consistent":
                scale = r * (g[i] / g[p]) * (s[p] / s[i])
                bias = abs((g[i] / s[i]) * (r * (m[p] - s[p] * b[p] / g[p]) - m[i]) + b[i])
            else:
                scale = r * (g[p] / g[i]) * (s[i] / s[p])
                bias = abs((g[p] / s[p]) * (r * (m[i] - s[i] * b[i] / g[i]) - m[p]) + b[p]) / scale
            if not (math.isfinite(scale) and math.isfinite(bias)):
                continue
            if formulation == "consistent" and scale < 0:
                continue
            candidates.append((column, distance, scale, bias))
        if not candidates:
            continue
        biases = [bias for *_, bias in candidates]
        span = max(biases) - min(biases)
        best, best_score = None, math.inf
        for column, distance, scale, bias in candidates:
            normalised = (bias - min(biases)) / span if span > 0 else 0
            score = lamda * distance + (1 - lamda) * normalised
            if score < best_score:
                best, best_score = (column, distance, scale), score
        column, distance, scale = best
        if threshold and 1 - distance < threshold:
            continue
        scaling[i, column] = scale
    return scaling


def absorb(weight: Tensor, positions: Tensor, scaling: Tensor) -> Tensor:
    """Algorithm 1, the next layer: column by column, `W_next <- W_next Z`.

    Args:
        weight: `(out, columns, ...)`, the consumer's weight.
        positions: `(n, s)`, the columns that each neuron owns.
        scaling: `Z`, `(n, k)`.

    Returns:
        `(out, k, s, ...)`: for each kept neuron its new columns.
    """
    neurons, kept = scaling.shape
    result = torch.zeros(weight.shape[0], kept, positions.shape[1], *weight.shape[2:])
    for p in range(kept):
        for i in range(neurons):
            for block, column in enumerate(positions[i].tolist()):
                result[:, p, block] += scaling[i, p] * weight[:, column]
    return result
