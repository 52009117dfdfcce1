"""One problem of a refit: some layers' parameters, and what their network says at some nodes, by Gauss-Newton.

Each round is a linear least-squares problem in all of the parameters, solved by conjugate gradients with each layer's
Gram matrix as preconditioner (the input factor of K-FAC, Martens and Grosse, ICML 2015).
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.refine.linear import Linear
from nm_lightning.compression.statistics.joins import rectified_gap
from nm_lightning.compression.statistics.patches import (
    as_columns,
    draw_rows,
    factorise,
    gram_of,
    places_of,
    read_patches,
)
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.runs import MEMORY, Run, Tensors, per_row
from nm_lightning.compression.structure.inputs import tensors_in
from nm_lightning.compression.structure.operations import BATCH_NORMS, CONVOLUTIONS, SOLVABLE

ITERATIONS = 6  # of conjugate gradients in a round
DAMPING = 0.1  # as a share of the mean curvature of each tensor
STEPS = (1.0, 0.5, 0.25)  # of a round's solution that are tried
POSITIONS = 10  # for each column of a layer, of which its Gram matrix is taken
WIDEST = 8192  # columns of a layer whose Gram matrix is worth its factors
TINY = 1e-30

Vector = dict[str, Tensor]  # by parameter, in float64


@dataclass
class End:
    """Where a consumer's output is compared with the original's.

    Attributes:
        node: in the narrow network's graph.
        original: the same node in the original's.
        axis: the channels' dimension.
        stays: `(k,)`, the original's channels that the narrow network still has; None for all.
        limit: the value above which a rectifier cuts what it reads there, infinite for ReLU; None without one.
    """

    node: fx.Node
    original: fx.Node
    axis: int
    stays: Tensor | None
    limit: float | None


def solvable(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node is the call of a Linear or convolution."""
    return node.op == "call_module" and isinstance(network.get_submodule(node.target), SOLVABLE)


class Window:
    """A site's least-squares problem: the residuals at its ends as a function of its layers' parameters.

    Args:
        wanted: the original on its way.
        found: the narrow network on its way.
        start: the first layer's node.
        behind: the same node of the original.
        ends: where outputs are compared.
        layers: whose parameters are free, by name.
        count: batches to look at, over all ranks.
        curved: the first of them that say how the loss is curved.

    Attributes:
        free: the parameters, by name.
    """

    def __init__(
        self,
        wanted: Run,
        found: Run,
        start: fx.Node,
        behind: fx.Node,
        ends: Sequence[End],
        layers: Mapping[str, nn.Module],
        count: int,
        curved: int,
    ):
        self.wanted, self.found = wanted, found
        self.start, self.behind, self.layers = start, behind, layers
        self.count, self.curved, self.share = count, curved, 1.0
        self.compare(ends)
        self.free = {
            f"{name}.{key}": parameter
            for name, layer in layers.items()
            for key, parameter in layer.named_parameters(recurse=False)
        }
        self.called = {node.target: node for node in found.nodes if node.target in layers}
        self.folded = dict(filter(None, map(self.fold, self.called.values())))
        self.targets: dict[int, list[Tensor]] = {}
        self.kept: list[tuple[Linear, list[Tensor]]] = []
        self.device = tensors_in(found.batches[0])[0].device
        self.ranks = ALONE

    def compare(self, ends: Sequence[End]) -> None:
        """Take these ends, each once."""
        self.ends = list({end.node: end for end in ends}.values())
        self.joins, self.energies = [end.node for end in self.ends], [1.0] * len(self.ends)

    def fold(self, node: fx.Node) -> tuple[str, str] | None:
        """A convolution and the BatchNorm that alone reads it, and reads nothing else."""
        (user, *more), network = [*node.users, None], self.found.module
        if not isinstance(network.get_submodule(node.target), CONVOLUTIONS) or len(more) != 1 or node in self.joins:
            return None
        norm = network.get_submodule(user.target) if user.op == "call_module" else None
        alone = [other for other in self.found.nodes if other.target == user.target] == [user]
        return (
            (node.target, user.target) if type(norm) in BATCH_NORMS and norm.running_var is not None and alone else None
        )

    def obstacle(self, env: Mapping[fx.Node, Any]) -> str:
        """Why its values can't be differentiated, forward and backward; empty if they can. `env` is of a few images."""
        env = {
            node: value for node, value in env.items() if self.found.position[node] < self.found.position[self.start]
        }
        start = {name: parameter.detach() for name, parameter in self.free.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch about itself, at the first use
                linear = self.linear(env, start)
                linear.pull(linear.push(start))
        except (NotImplementedError, RuntimeError) as error:
            return f"it can't be differentiated: {str(error).partition(chr(10))[0]}"
        return ""

    def solve(self, rounds: int, ranks: Ranks = ALONE) -> float:
        """Rounds of Gauss-Newton, until one does not lessen the loss, in place; the loss at the end."""
        self.ranks = ranks
        energies = torch.zeros(len(self.ends), dtype=torch.float64, device=self.device)
        for _, targets, _ in self.batches():
            energies += torch.stack([target.square().sum(dtype=torch.float64) for target in targets])
        (energies,) = self.ranks.total(energies)
        self.energies = energies.clamp(min=max(1e-6 * float(energies.max()), TINY)).tolist()
        loss = None if rounds else self.loss({name: parameter.detach() for name, parameter in self.free.items()})
        for _ in range(rounds):
            before, loss = loss, self.step()
            if loss == before:
                break
        self.targets.clear()
        return loss

    def step(self) -> float:
        """One round, in place, if it lessens the loss, which is returned."""
        start = {name: parameter.detach().clone() for name, parameter in self.free.items()}
        best, residual, curvature, grams = self.survey(start)
        damping = {name: DAMPING * value for name, value in curvature.items()}
        factors = {}
        for name, gram in grams.items():
            scale = gram.diagonal(dim1=1, dim2=2).mean().clamp(min=TINY)
            factors[name] = factorise(gram / scale, torch.full_like(gram[0, 0], DAMPING))
        total = zeros(start)
        ahead = self.precondition(residual, curvature, factors)
        direction, gain = ahead, dot(residual, ahead)
        for _ in range(ITERATIONS):
            if not gain > 0:
                break
            image = add(self.product(start, direction), direction, damping)
            length = gain / dot(direction, image)
            total, residual = add(total, direction, length), add(residual, image, -length)
            ahead = self.precondition(residual, curvature, factors)
            gain, before = dot(residual, ahead), gain
            direction = add(ahead, direction, gain / before)
        self.kept.clear()
        for step in STEPS:
            trial = {name: (value + step * total[name]).to(value.dtype) for name, value in start.items()}
            loss = self.loss(trial)
            if loss < best:
                for name, parameter in self.free.items():
                    parameter.copy_(trial[name])
                return loss
        return best

    def survey(self, start: Mapping[str, Tensor]) -> tuple[float, Vector, Vector, dict[str, Tensor]]:
        """One pass over the images at the present parameters, which `product` goes on from.

        Returns:
            The loss; its descent; by tensor the mean of the diagonal of the curvature, from random signs at the ends
            (Hutchinson); and the Gram matrices `(groups, p, p)` of what each layer multiplies its weight with, of a
            sample of positions.
        """
        descent, spread, grams = zeros(start), zeros(start), {}
        for name, layer in self.layers.items():
            if not isinstance(layer, SOLVABLE) or layer.weight[0].numel() > WIDEST:
                continue
            groups, size = getattr(layer, "groups", 1), layer.weight[0].numel() + (layer.bias is not None)
            grams[name] = layer.weight.new_zeros(groups, size, size, dtype=torch.float64)
        loss, images, looked, used = 0.0, 0, 0, 0  # `looked`: images that say how the loss is curved
        for number, targets, env in self.batches():
            linear = self.linear(env, start)
            gaps = self.gaps(targets, linear.values)
            loss, images = loss + self.energy(gaps), images + len(gaps[0])
            accumulate(descent, linear.pull([gap / own for gap, own in zip(gaps, self.energies, strict=True)]))
            if number < self.curved:
                weights = self.weights(targets, linear.values)
                accumulate(spread, linear.pull(signs(weights, number)))
                accumulate(grams, {name: self.gram(linear, name, number) for name in grams})
                looked, used = looked + len(gaps[0]), used + linear.size
                self.kept = [*self.kept, (linear, weights)] if used <= MEMORY else []
        counts = torch.tensor([loss, images, looked], dtype=torch.float64, device=self.device)
        counts, *sums = self.ranks.total(counts, *descent.values(), *spread.values(), *grams.values())
        for own in (descent, spread, grams):
            own.update({name: sums.pop(0) for name in own})
        loss, images, looked = counts.tolist()
        self.share = looked / images if looked else 1.0
        curvature = {name: (value.square().mean() / self.share).clamp(min=TINY) for name, value in spread.items()}
        return loss / len(self.ends), descent, curvature, grams

    def gram(self, linear: Linear, name: str, seed: int) -> Tensor:
        """The Gram matrix `(groups, p, p)` of what a layer multiplies its weight with, at some positions of a batch."""
        layer, node = self.layers[name], self.called[name]
        groups, shape = getattr(layer, "groups", 1), linear.env[node].shape
        each = math.ceil(POSITIONS * layer.weight[0].numel() / (shape[0] * self.curved))
        every = torch.ones(layer.weight.shape[1] * groups, dtype=torch.bool)
        rows = draw_rows(shape[0], places_of(layer, shape), each, seed)
        patches = read_patches(layer, linear.env[node.all_input_nodes[0]], every, groups, rows)
        return gram_of(patches if layer.bias is not None else patches[..., :-1])

    def product(self, start: Mapping[str, Tensor], direction: Vector) -> Vector:
        """The Gauss-Newton matrix times a direction, `J^T J d`, as the sum over all images would be."""
        found = zeros(direction)
        again = ((self.linear(env, start), targets) for _, targets, env in self.batches(self.curved))
        again = ((linear, self.weights(targets, linear.values)) for linear, targets in again)
        for linear, weights in self.kept or again:
            accumulate(found, linear.pull(scaled(linear.push(direction), weights)))
        return {name: value / self.share for name, value in zip(found, self.ranks.total(*found.values()), strict=True)}

    def loss(self, parameters: Mapping[str, Tensor]) -> float:
        """The squared residuals' share of the targets' energy, in the mean over the ends."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, targets, env in self.batches():
            loss += self.energy(self.gaps(targets, self.found.values(env, self.joins, self.tensors(parameters))))
        return float(self.ranks.total(loss)[0]) / len(self.ends)

    def energy(self, gaps: Sequence[Tensor]) -> Tensor:
        """The squares' sum, over each end's energy."""
        each = [gap.square().sum(dtype=torch.float64) / own for gap, own in zip(gaps, self.energies, strict=True)]
        return torch.stack(each).sum()

    def precondition(self, vector: Vector, curvature: Vector, factors: Mapping[str, Tensor]) -> Vector:
        """A vector divided by the curvature: layer by layer through its Gram matrix, other tensors by their mean."""
        ahead = {name: value / ((1 + DAMPING) * curvature[name]) for name, value in vector.items()}
        for name, factor in factors.items():
            weight, bias = vector[f"{name}.weight"], vector.get(f"{name}.bias")
            groups, columns = len(factor), weight.shape[1]
            right = as_columns(weight, groups)
            right = right if bias is None else torch.cat([right, bias.view(groups, 1, -1)], dim=1)
            right = right / curvature[f"{name}.weight"]
            solved = torch.cholesky_solve(right, factor)  # (groups, taps * columns (+ 1), out / groups)
            if bias is not None:
                solved, ahead[f"{name}.bias"] = solved[:, :-1], solved[:, -1].reshape(bias.shape)
            solved = solved.view(groups, -1, columns, len(weight) // groups).permute(0, 3, 2, 1)
            ahead[f"{name}.weight"] = solved.reshape(weight.shape)
        return ahead

    def batches(self, count: int | None = None) -> Iterator[tuple[int, list[Tensor], dict[fx.Node, Any]]]:
        """Each batch's number over all ranks, the original's values at the ends, the narrow network's at the start."""
        used, count = 0, self.count if count is None else count
        count = max(0, -(-(count - self.ranks.rank) // self.ranks.size))  # dealt in turn; a rank may have none
        known = all(index in self.targets for index in range(min(count, len(self.found.batches))))
        behind = itertools.repeat(None) if known else self.wanted.states(self.behind, count)
        states = zip(behind, self.found.states(self.start, count), strict=not known)
        for index, (_, env) in enumerate(states):
            targets = self.targets.get(index)
            if targets is None:
                self.wanted.env = dict(self.wanted.env)  # what lies ahead is not kept
                targets = [self.wanted.value(end.original) for end in self.ends]
                targets = [
                    target if end.stays is None else target.index_select(end.axis, end.stays)
                    for target, end in zip(targets, self.ends, strict=True)
                ]
            used += sum(target.numel() * target.element_size() for target in targets)
            if used <= MEMORY:
                self.targets[index] = targets
            yield index * self.ranks.size + self.ranks.rank, targets, env

    def tensors(self, parameters: Mapping[str, Tensor]) -> Tensors:
        """What the layers compute with; a BatchNorm behind a convolution is multiplied into its weight."""
        found: dict[str, Any] = {
            name: {key: parameters[f"{name}.{key}"] for key, _ in layer.named_parameters(recurse=False)}
            for name, layer in self.layers.items()
        }
        for name, norm in self.folded.items():
            layer = self.found.module.get_submodule(norm)
            own = found.get(norm, layer._parameters)
            scale = torch.rsqrt(layer.running_var + layer.eps)
            scale = scale if own.get("weight") is None else scale * own["weight"]
            shift = -layer.running_mean * scale
            found[norm] = shift if own.get("bias") is None else shift + own["bias"]
            found[name] = {key: value * per_row(scale, value) for key, value in found[name].items()}
        return found

    def linear(self, env: Mapping[fx.Node, Any], start: Mapping[str, Tensor]) -> Linear:
        """A batch at the present parameters to first order."""
        return Linear(self.found, env, self.joins, self.tensors, start)

    def gaps(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """At each end what is missing; nothing where a rectifier cuts both values."""
        return [
            target - value if end.limit is None else rectified_gap(target, value, end.limit)
            for end, target, value in zip(self.ends, targets, values, strict=True)
        ]

    def weights(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """At each end one over the end's energy, zero where a rectifier cuts both the target and the value."""
        weights = []
        for end, energy, target, value in zip(self.ends, self.energies, targets, values, strict=True):
            counts = torch.ones_like(value)
            if end.limit is not None:
                counts = ((target > 0) | (value > 0)) & ((target < end.limit) | (value < end.limit))
            weights.append(counts.to(value) / energy)
        return weights


def signs(weights: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
    """Random ones at the ends, times the roots of the weights."""
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    drawn = [torch.empty_like(weight).random_(0, 2, generator=generator) * 2 - 1 for weight in weights]
    return scaled(drawn, [weight.sqrt() for weight in weights])


def scaled(values: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each value times its weight."""
    return tuple(value * weight for value, weight in zip(values, weights, strict=True))


def zeros(like: Mapping[str, Tensor]) -> Vector:
    """Of the same shapes."""
    return {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}


def accumulate(sums: Vector, more: Mapping[str, Tensor]) -> None:
    """Add to each sum, in float64."""
    for name, value in more.items():
        sums[name] += value.detach().double()


def add(vector: Vector, other: Vector, factor: float | Mapping[str, float]) -> Vector:
    """`vector + factor * other`; the factor may differ from tensor to tensor."""
    each = factor if isinstance(factor, Mapping) else dict.fromkeys(vector, factor)
    return {name: value + each[name] * other[name] for name, value in vector.items()}


def dot(vector: Vector, other: Vector) -> float:
    """The scalar product."""
    return float(sum((value * other[name]).sum() for name, value in vector.items()))
