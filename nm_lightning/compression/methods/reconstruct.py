"""Reconstruct: least squares for each layer behind a removed neuron, so that it says again what the original's says.

Layer by layer, in the order of execution: what the layer reads in the already compressed network is regressed on what
its output lacks of the original's, and the coefficients are added to its weight and bias. The lack is measured where
the output joins another stream (after its BatchNorm, at the end of a residual block), so that each block also repairs
what those before it lost; and behind a ReLU only what passes it counts. No labels, no gradient.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph import shapes_of
from nm_lightning.compression.methods.attention import turned
from nm_lightning.compression.methods.channel import by_channel
from nm_lightning.compression.settings import Method, choice, number, setting
from nm_lightning.compression.statistics.joins import Join, find_join, rectified_gap
from nm_lightning.compression.statistics.patches import (
    ENOUGH,
    as_columns,
    at_rows,
    draw_rows,
    factorise,
    gram_of,
    places_of,
    read_patches,
    ridge_of,
)
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.runs import (
    Held,
    Run,
    channels_that_stay,
    narrow_norms,
    recorded,
    used_again,
    without_in_place,
)
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.columns import add_columns, add_constant, silence, silence_rows
from nm_lightning.compression.structure.copies import evaluated, with_data
from nm_lightning.compression.structure.decomposition import Decomposition
from nm_lightning.compression.structure.inputs import Inputs, length
from nm_lightning.compression.structure.operations import CONVOLUTIONS, SOLVABLE
from nm_lightning.compression.structure.plan import named_tensors
from nm_lightning.compression.structure.sites import Site
from nm_lightning.progress import progress

UNSURE = 10  # times the ridge on synthetic images, whose correlations are only near the data's
LARGER = 6  # powers of ten that are tried of a ridge
DEAD = 1e-4  # an output that its norm scales by less than this share of the largest is left alone


@dataclass(frozen=True)
class Reconstruct(Method):
    """Solves the layers behind by least squares on calibration images."""

    name = "reconstruct"
    looks = True
    ridge: float = setting(
        1e-3,
        "of the least squares of reconstruct, as a share of the mean diagonal; ten times that on synthetic images",
        number(0),
    )
    reconstruction: str = setting(
        "layer",
        "layer: each layer for itself; channel: one map for each site, as GRAIL does",
        choice("layer", "channel"),
    )

    def decompose(self, subject: Subject, keeps: Mapping[str, Tensor]) -> Decomposition:
        """The consumers' weights, solved in a copy, and biases where a constant finds no other place."""
        ridge = self.ridge * (UNSURE if subject.calibration.synthetic else 1)
        if self.reconstruction == "channel":
            return by_channel(subject, keeps, ridge, self.name)
        found = Decomposition.pruned(subject.sites, keeps, self.name)
        shrinking = found.shrinking(subject.sites)
        before = named_tensors(evaluated(subject.model))
        original = turned(subject, [site for site, _, _ in shrinking], keeps)
        solved = with_data(original)
        sites = [site for site, _, _ in shrinking]
        validate = not subject.calibration.drawn  # halves of drawn images say each other, and little of the data
        errors, refused = reconstruct(
            original, solved, sites, keeps, subject.batches, ridge, ranks=subject.ranks, validate=validate
        )
        for site, row, _ in shrinking:
            names = [consumer.name for consumer in site.consumers]
            row.error = max((errors[name] for name in names if name in errors), default=None)
            row.note = next((f"pruned, not reconstructed: {refused[name]}" for name in names if name in refused), "")
        for name, value in named_tensors(solved).items():
            if name not in before:
                found.biases[name.removesuffix(".bias")] = value.detach()
            elif not torch.equal(value, before[name]):
                found.tensors[name] = value.detach()
        return found


@dataclass
class Task:
    """A layer to solve.

    Attributes:
        node: its call in the graph.
        layer: its name.
        stays: `(columns,)`, whether each of the weight's columns, counted over all groups, is read.
        rows: `(out,)`, whether each of its outputs is a neuron that stays.
    """

    node: fx.Node
    layer: str
    stays: Tensor
    rows: Tensor


@torch.no_grad()
def reconstruct(
    original: nn.Module,
    wide: nn.Module,
    sites: Sequence[Site],
    keeps: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    ridge: float = 1e-3,
    rectify: int = 2,
    ranks: Ranks = ALONE,
    validate: bool = True,
) -> tuple[dict[str, float], dict[str, str]]:
    """Solve all layers behind the removed neurons.

    Args:
        original: the network as it was; it is only read.
        wide: a copy of it, still at its full width; the removed neurons' columns become zero, the others are solved,
            in place. A layer without a bias and without a BatchNorm behind it gets a bias.
        sites: the sites that shrink.
        keeps: by site, the survivors `(k,)`.
        batches: inputs as the network is called with.
        ridge: what is added to the diagonal of each layer's Gram matrix, as a share of the diagonal's mean.
        rectify: rounds of least squares in which an output below a ReLU's threshold may stay below it.
        ranks: that each have a share of the images.
        validate: whether the ridge of a layer that has few images is chosen by halves of them, see `validated`.

    Returns:
        By layer, the share of the original output's energy that is still missing; and by layer the reason why it
        could not be solved and is pruned instead.
    """
    graph, batches = recorded(original, batches)
    shapes = shapes_of(graph)
    names = {node.name: node for node in graph.nodes}
    again = used_again(graph, original)
    tensors = named_tensors(wide)
    columns, refused = {}, {}
    for site in sites:
        for consumer in site.consumers:
            stays = consumer.stays(keeps[site.name])
            silence(tensors, consumer, stays)
            node = names.get(consumer.node)
            layer = original.get_submodule(node.target) if node is not None and node.op == "call_module" else None
            if not isinstance(layer, SOLVABLE) or node.target != consumer.name:
                refused[consumer.name] = f"{consumer.name} is no Linear or convolution of its own"
            elif consumer.name in again:
                refused[consumer.name] = f"{consumer.name} or its weight is used several times"
            else:
                columns[consumer.name] = columns.get(consumer.name, True) & stays
        silence_rows(tensors, site, keeps[site.name])
    solvable = {name for name, layer in original.named_modules() if isinstance(layer, SOLVABLE)}
    rows = channels_that_stay(sites, keeps, solvable)
    cut = {pair.maker for site in sites for pair in site.pairs}
    tasks = find_tasks(graph, original, columns, rows, refused, again, cut)
    switched = without_in_place(graph, original, wide)
    wanted, found = Run(original, graph, batches), Run(wide, graph, batches)
    found.norms = narrow_norms(original, sites, keeps)
    images = ranks.images(batches)
    pending = {task.node for task in tasks}
    errors = {}
    for task in progress(tasks, "reconstructing"):
        pending.discard(task.node)
        join = find_join(task.node, original, pending, shapes, again)
        errors[task.layer] = solve_layer(task, join, wide, wanted, found, ridge, rectify, images, ranks, validate)
    for module in switched:
        module.inplace = True
    return errors, refused


def find_tasks(
    graph: fx.Graph,
    model: nn.Module,
    columns: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    refused: Mapping[str, str],
    again: Set[str],
    cut: Set[str] = frozenset(),
) -> list[Task]:
    """The layers to solve, in the order of execution: those that lost columns, and all that read what they changed.

    And all that read what those of `cut` say, which lost rows that no layer reads.
    """
    tasks, changed = [], set()
    for node in graph.nodes:
        if any(source in changed for source in node.all_input_nodes):
            changed.add(node)
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        stays = columns.get(node.target) if layer is not None else None
        narrowed = stays is not None and not bool(stays.all())
        if narrowed or (layer is not None and node.target in refused):
            changed.add(node)
        if isinstance(layer, SOLVABLE) and node in changed and node.target not in again:
            groups = getattr(layer, "groups", 1)
            width = layer.weight.shape[1] * groups
            if narrowed or (groups == 1 and node.target not in refused):
                every = torch.ones(width, dtype=torch.bool)
                made = rows.get(node.target, torch.ones(len(layer.weight), dtype=torch.bool))
                tasks.append(Task(node, node.target, every if stays is None else stays, made))
        if node.target in cut:
            changed.add(node)
    return tasks


def solve_layer(
    task: Task,
    join: Join,
    wide: nn.Module,
    wanted: Run,
    found: Run,
    ridge: float,
    rectify: int,
    images: int,
    ranks: Ranks = ALONE,
    validate: bool = True,
) -> float:
    """Regress the gap at the join on what the layer reads, and add the coefficients to its weight; the share left.

    Of more than `ENOUGH` positions for each unknown a sample is looked at: some of each of
    all ranks' `images`, drawn by seed.
    """
    layer = wide.get_submodule(task.layer)
    groups, out = getattr(layer, "groups", 1), len(layer.weight)
    scale = layer.weight.new_ones(out) if join.scale is None else join.scale
    alive = (scale.abs() > DEAD * scale.abs().max()) & task.rows.to(scale.device)
    solved = alive.nonzero().flatten() if groups == 1 else torch.arange(out, device=scale.device)
    samples = Held(lambda: looked_at(task, join, layer, solved, wanted, found, images, ranks), found.memory)
    halves = validate and (join.limit is None or not task.stays.all())  # what lost nothing would fall silent
    parts = normal_equations(samples, 2 if halves else 1, ranks)
    gram, cross, missing, energy = map(sum, zip(*parts, strict=True))
    if halves:
        ridge = validated(ridge, parts, samples, join.limit, ranks)
    penalty = ridge_of(gram, ridge)
    factor = factorise(gram, penalty)
    total = torch.cholesky_solve(cross, factor)
    gained = 2 * (total * cross).sum() - (total * (gram @ total)).sum()
    share = float(((missing - gained) / energy.clamp(min=1e-30)).clamp(min=0))
    for _ in range(rectify if join.limit is not None else 0):
        cross = torch.zeros_like(total)
        for patches, target, value in samples:
            gap = rectified_gap(target, value + patches @ total.to(patches.dtype), join.limit)
            cross += (patches.transpose(1, 2) @ gap).double()
        (cross,) = ranks.total(cross)
        total = total + torch.cholesky_solve(cross - penalty[:, None] * total, factor)
    change = layer.weight.new_zeros(out, total.shape[1])
    change[solved] = total.transpose(1, 2).flatten(0, 1).to(change.dtype)  # (out, taps * kept + 1)
    change = torch.where(alive[:, None], change / scale[:, None], 0.0)
    add_columns(layer.weight, task.stays.to(layer.weight.device), change[:, :-1], groups)
    add_constant(layer, wide.get_submodule(join.norm) if join.norm else None, change[:, -1])
    return share


def normal_equations(samples: Held, parts: int, ranks: Ranks) -> list[tuple[Tensor, ...]]:
    """Of each of so many parts of the images, over all ranks, what least squares need.

    Returns:
        For each part the Gram matrix `(groups, p, p)` of what is read, its products with the gap `(groups, p, out)`,
        the gap's energy and the targets'; all in float64.
    """
    sums = []
    for each in samples:
        split = (tensor.tensor_split(parts, dim=1) for tensor in each)
        new = []
        for read, wanted, own in zip(*split, strict=True):
            gap = wanted - own
            energies = (values.square().sum(dtype=torch.float64) for values in (gap, wanted))
            new += [gram_of(read), (read.transpose(1, 2) @ gap).double(), *energies]
        sums = [old.add_(more) for old, more in zip(sums, new, strict=True)] if sums else new
    sums = ranks.total(*sums)
    return [tuple(sums[first : first + 4]) for first in range(0, len(sums), 4)]


def validated(
    ridge: float, halves: Sequence[tuple[Tensor, ...]], samples: Held, limit: float | None, ranks: Ranks
) -> float:
    """The ridge, or that power of ten times it by which each half of the images says most of the other half.

    Where there are fewer than half of `ENOUGH` positions for each unknown; elsewhere the ridge hardly counts. It is
    increased while that helps. Behind a rectifier only what passes it counts.
    """
    counts, width = [float(gram[0, -1, -1]) for gram, *_ in halves], halves[0][0].shape[1]
    if not min(counts) or sum(counts) >= ENOUGH * width / 2:
        return ridge

    def lost(ridge: float) -> float:
        solved = [torch.cholesky_solve(cross, factorise(gram, ridge_of(gram, ridge))) for gram, cross, *_ in halves]
        left = torch.zeros((), dtype=torch.float64, device=solved[0].device)
        if limit is None:
            for (gram, cross, missing, _), change in zip(halves[::-1], solved, strict=True):
                left += missing - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
            return float(left)
        for patches, target, value in samples:
            parts = (each.tensor_split(2, dim=1) for each in (patches, target, value))
            for read, wanted, own, change in zip(*parts, solved[::-1], strict=True):
                gap = rectified_gap(wanted, own + read @ change.to(read.dtype), limit)
                left += gap.square().sum(dtype=torch.float64)
        return float(ranks.total(left)[0])

    best = lost(ridge)
    for _ in range(LARGER):
        new = lost(10 * ridge)
        if not new < best:
            break
        best, ridge = new, 10 * ridge
    return ridge


def looked_at(
    task: Task, join: Join, layer: nn.Module, solved: Tensor, wanted: Run, found: Run, images: int, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batch by batch what the layer reads, and target and value at the join; each `(groups, positions, ...)`."""
    groups, dim = getattr(layer, "groups", 1), 1 if isinstance(layer, CONVOLUTIONS) else -1
    parts = zip(layer.weight.chunk(groups), task.stays.chunk(groups), strict=True)
    weight = as_columns(torch.cat([part[:, own] for part, own in parts]), groups)
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    weight = torch.cat([weight, bias.view(groups, 1, -1)], dim=1)
    weight = weight[..., solved] if groups == 1 else weight
    for index, (_, env) in enumerate(zip(wanted.states(task.node), found.states(task.node), strict=True)):
        target, read = wanted.value(join.end), env[task.node.all_input_nodes[0]]
        shape, count = target.shape, length(found.batches[index])
        each = -(-ENOUGH * weight.shape[1] * count // (images * shape[0]))
        rows = draw_rows(shape[0], places_of(layer, shape), each, index * ranks.size + ranks.rank)
        patches = read_patches(layer, read, task.stays, groups, rows)
        output = (patches @ weight).transpose(0, 1).flatten(1)
        value = join.value(output, found, shape, rows, dim, solved)
        target = at_rows(target, rows, dim)[:, solved]
        yield patches, *(each.unflatten(1, (groups, -1)).transpose(0, 1) for each in (target, value))
