"""A neuron as a vector of its weights, and what the BatchNorm behind it does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nm_lightning.compression.structure.sites import Member


def neuron_vectors(member: Member, tensors: Mapping[str, Tensor], with_bias: bool) -> Tensor:
    """Each neuron's weight vector `w_i`: `(n, d)` in float32, the bias appended where asked for and present.

    Args:
        member: a producer.
        tensors: the network's, by name.
        with_bias: whether a bias belongs to the vector.
    """
    (whole,) = vectors_in_parts(member, tensors, with_bias, len(member.owner))
    return whole


def vectors_in_parts(member: Member, tensors: Mapping[str, Tensor], with_bias: bool, neurons: int) -> Iterator[Tensor]:
    """The same for so many `neurons` at a time."""
    (weight, dim), *others = member.slots
    positions, rows = member.positions(), tensors[weight].detach().movedim(dim, 0)
    as_they_lie = torch.equal(positions[:, 0], torch.arange(len(rows)))  # nothing to gather
    for first in range(0, len(positions), neurons):
        own = slice(first, first + neurons)
        parts = [(rows[own] if as_they_lie else rows[positions[own]]).flatten(1)]
        parts += [tensors[bias].detach()[positions[own]] for bias, _ in others if with_bias]
        yield (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).float()


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
