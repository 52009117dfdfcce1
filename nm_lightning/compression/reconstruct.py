"""Reconstruct: least squares for each layer behind a removed neuron, so that it says again what the original's says.

Layer by layer, in the order of execution: what the layer reads in the already compressed network is regressed on what
its output lacks of the original's, and the coefficients are added to its weight and bias. The lack is measured where
the output joins another stream (after its BatchNorm, at the end of a residual block), so that each block also repairs
what those before it lost; and behind a ReLU only what passes it counts. No labels, no gradient.
"""

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from rich import get_console
from rich.progress import track
from torch import Tensor, fx, nn

from nm_lightning.compression.fold import apply_plan, named_tensors, plan_sites
from nm_lightning.compression.follow import BATCH_NORMS, CONVOLUTIONS, MIXING_NORMS, SOLVABLE, Tracer, operation_name
from nm_lightning.compression.prepare import plain_copy
from nm_lightning.compression.ranks import ALONE, Ranks
from nm_lightning.compression.runs import NarrowNorm, Run, without_in_place
from nm_lightning.compression.sites import Consumer, Site

SAME = ("dropout", "dropout2d", "identity", "stochasticdepth")  # what evaluation leaves as it is
RECTIFIERS = {"relu": float("inf"), "relu6": 6.0}  # the value at which each saturates
DEAD = 1e-4  # an output that its norm scales by less than this share of the largest is left alone


@dataclass
class Task:
    """A layer to solve.

    Attributes:
        node: its call in the graph.
        layer: its name.
        stays: `(columns,)`, whether each of the weight's columns, counted over all groups, is read.
    """

    node: fx.Node
    layer: str
    stays: Tensor


@dataclass
class Join:
    """Where a layer's output is compared with the original's.

    Attributes:
        end: the node.
        scale: `(out,)`, what a unit of the layer's output is there; None for 1.
        norm: the name of the BatchNorm directly behind the layer, if it can take a constant.
        limit: the value above which a rectifier cuts what it reads there, infinite for ReLU; None without one.
    """

    end: fx.Node
    scale: Tensor | None
    norm: str | None
    limit: float | None


@torch.no_grad()
def reconstruct(
    original: nn.Module,
    wide: nn.Module,
    sites: Sequence[Site],
    keeps: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    ridge: float = 1e-3,
    rectify: int = 2,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], dict[str, str]]:
    """Solve all layers behind the removed neurons.

    Args:
        original: the network as it was; it is only read.
        wide: a copy of it, still at its full width; the removed neurons' columns become zero, the others are solved,
            in place. A layer without a bias and without a BatchNorm behind it gets a bias.
        sites: the sites that shrink.
        keeps: by site, the survivors `(k,)`.
        batches: images `(N, ...)` as the network reads them.
        ridge: what is added to the diagonal of each layer's Gram matrix, as a share of the diagonal's mean.
        rectify: rounds of least squares in which an output below a ReLU's threshold may stay below it.
        ranks: that each have a share of the images.

    Returns:
        By layer, the share of the original output's energy that is still missing; and by layer the reason why it
        could not be solved and is pruned instead.
    """
    graph = Tracer().trace(original)
    names = {node.name: node for node in graph.nodes}
    again = used_again(graph, original)
    columns, refused = {}, {}
    for site in sites:
        for consumer in site.consumers:
            stays = torch.isin(consumer.owner, keeps[site.name]) | (consumer.owner < 0)
            silence(wide, consumer, stays)
            node = names.get(consumer.node)
            layer = original.get_submodule(node.target) if node is not None and node.op == "call_module" else None
            if not isinstance(layer, SOLVABLE) or node.target != consumer.name:
                refused[consumer.name] = f"{consumer.name} is no Linear or convolution of its own"
            elif consumer.name in again:
                refused[consumer.name] = f"{consumer.name} or its weight is used several times"
            else:
                columns[consumer.name] = columns.get(consumer.name, True) & stays
    tasks = find_tasks(graph, original, columns, refused, again)
    constants = [node.target for node in graph.nodes if node.op == "get_attr" and "." not in node.target]
    constants = [name for name in constants if not hasattr(wide, name)]  # fx hangs tensors of the forward's code there
    for name in constants:
        setattr(wide, name, getattr(original, name))
    switched = without_in_place(graph, original, wide)
    wanted, found = Run(original, graph, batches), Run(wide, graph, batches)
    found.norms = narrow_norms(original, sites, keeps)
    shapes = shapes_of(Run(original, graph, [batches[0][:2]]))
    pending = {task.node for task in tasks}
    errors = {}
    for task in track(tasks, "reconstructing", transient=True, disable=not get_console().is_terminal):
        pending.discard(task.node)
        join = find_join(task.node, original, pending, shapes, again)
        errors[task.layer] = solve_layer(task, join, wide, wanted, found, ridge, rectify, ranks)
    for module in switched:
        module.inplace = True
    for name in constants:
        delattr(wide, name)
    return errors, refused


def used_again(graph: fx.Graph, model: nn.Module) -> set[str]:
    """The layers that are called several times, or that have a parameter which something else reads, too."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
    for node in graph.nodes:
        if node.op == "get_attr":
            owners[id(functools.reduce(getattr, node.target.split("."), model))] += 1
    shared = {name for name in calls for own in model.get_submodule(name).parameters() if owners[id(own)] > 1}
    return shared | {name for name, count in calls.items() if count > 1}


def silence(wide: nn.Module, consumer: Consumer, stays: Tensor) -> None:
    """Zero the columns that a consumer no longer reads, in place."""
    name, dim = consumer.slots[0]
    weight = named_tensors(wide)[name].movedim(dim, 1)
    for part, own in zip(weight.chunk(consumer.groups), stays.chunk(consumer.groups), strict=True):
        part[:, ~own.to(weight.device)] = 0


def narrow_norms(original: nn.Module, sites: Sequence[Site], keeps: Mapping[str, Tensor]) -> dict[str, NarrowNorm]:
    """The normalisations that mix channels, as they are over the survivors alone."""
    layers = dict(original.named_modules())
    mixing = [
        (site, member) for site in sites for member in site.passed if isinstance(layers.get(member.name), MIXING_NORMS)
    ]
    if not mixing:
        return {}
    narrow = apply_plan(plain_copy(original)[0], plan_sites(sites, keeps))
    masks: dict[str, Tensor] = {}  # a norm may read several sites
    for site, member in mixing:
        stays = torch.isin(member.owner, keeps[site.name]) | (member.owner < 0)
        masks[member.name] = masks.get(member.name, True) & stays
    axes = {member.name: member.axis for _, member in mixing}
    return {
        name: NarrowNorm(narrow.get_submodule(name), axes[name], stays.nonzero().flatten())
        for name, stays in masks.items()
    }


def shapes_of(run: Run) -> dict[fx.Node, torch.Size]:
    """The shape of each node's value that is a tensor, for the first batch."""
    first, *nodes, _ = run.nodes
    run.env = {first: run.batches[0].clone()}
    return {node: value.shape for node in nodes if isinstance(value := run.value(node), Tensor)}


def find_tasks(
    graph: fx.Graph,
    model: nn.Module,
    columns: Mapping[str, Tensor],
    refused: Mapping[str, str],
    again: Set[str],
) -> list[Task]:
    """The layers to solve, in the order of execution: those that lost columns, and all that read what they changed."""
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
                tasks.append(Task(node, node.target, every if stays is None else stays))
    return tasks


def find_join(
    call: fx.Node,
    model: nn.Module,
    pending: set[fx.Node],
    shapes: Mapping[fx.Node, torch.Size],
    again: Set[str],
) -> Join:
    """Follow the output of a layer's call through norms and additions, as long as nothing else reads it."""
    node, scale, norm = call, None, None
    by_channel = isinstance(model.get_submodule(call.target), CONVOLUTIONS) or len(shapes[node]) == 2
    while len(node.users) == 1:
        (user,) = node.users
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        operation = operation_name(user, module)
        if shapes.get(user) != shapes[call]:
            break
        if isinstance(module, BATCH_NORMS) and module.running_var is not None and by_channel:
            norm = user.target if node is call and user.target not in again else norm
            own = torch.rsqrt(module.running_var + module.eps)
            own = own if module.weight is None else own * module.weight
            scale = own if scale is None else scale * own
        elif operation in ("add", "iadd"):
            others = [source for source in user.all_input_nodes if source is not node]
            if len(others) != 1 or len(user.args) != 2 or user.kwargs or not known(others[0], call, pending):
                break
        elif operation not in SAME:
            break
        node = user
    readers = {operation_name(user, model.get_submodule(user.target) if user.op == "call_module" else None)
               for user in node.users}  # fmt: skip
    limit = RECTIFIERS.get(next(iter(readers))) if len(readers) == 1 else None
    return Join(node, scale, norm, limit)


def known(node: fx.Node, task: fx.Node, pending: set[fx.Node]) -> bool:
    """Whether a node's value is final before `task`'s layer is solved."""
    seen, ahead = set(), [node]
    while ahead:
        here = ahead.pop()
        if here is task or here in pending:
            return False
        if here not in seen:
            seen.add(here)
            ahead += here.all_input_nodes
    return True


def solve_layer(
    task: Task, join: Join, wide: nn.Module, wanted: Run, found: Run, ridge: float, rectify: int, ranks: Ranks = ALONE
) -> float:
    """Regress the gap at the join on what the layer reads, and add the coefficients to its weight; the share left."""
    layer = wide.get_submodule(task.layer)
    groups, out = getattr(layer, "groups", 1), layer.weight.shape[0]
    scale = layer.weight.new_ones(out) if join.scale is None else join.scale
    alive = scale.abs() > DEAD * scale.abs().max()
    source = task.node.all_input_nodes[0]
    gram, share = None, 0.0
    for step in range(1 + (rectify if join.limit is not None else 0)):
        cross, missing, energy, fresh = 0.0, 0.0, 0.0, 0.0
        for _, env in zip(wanted.states(task.node), found.states(task.node), strict=True):
            target = wanted.value(join.end)
            found.env = dict(env)  # what lies behind the layer changes with it
            value = found.value(join.end)
            gap = rectified_gap(target, value, join.limit) if step else target - value
            cross += correlate(layer, env[source], gap, task.stays).double()
            if step == 0:
                patches = read_patches(layer, env[source], task.stays, groups)
                fresh += (patches.transpose(1, 2) @ patches).double()
                missing += gap.square().sum(dtype=torch.float64)
                energy += target.square().sum(dtype=torch.float64)
        (cross,) = ranks.total(cross)
        if step == 0:
            gram, missing, energy = ranks.total(fresh, missing, energy)
            total = torch.zeros_like(cross)
            penalty = ridge * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean()
            penalty = torch.full((gram.shape[1],), float(penalty), dtype=gram.dtype, device=gram.device)
            penalty[-1] = 0
            factor = factorise(gram, penalty)
        change = torch.cholesky_solve(cross - penalty[:, None] * total, factor)
        total = total + change
        if step == 0:
            gained = 2 * (change * cross).sum() - (change * (gram @ change)).sum()
            share = float(((missing - gained) / energy.clamp(min=1e-30)).clamp(min=0))
        change = change.transpose(1, 2).reshape(out, -1)  # (out, taps * kept + 1)
        change = torch.where(alive[:, None], change / scale[:, None], 0.0).to(layer.weight.dtype)
        add_columns(layer.weight, task.stays.to(layer.weight.device), change[:, :-1], groups)
        add_constant(layer, wide.get_submodule(join.norm) if join.norm else None, change[:, -1])
    return share


def rectified_gap(target: Tensor, value: Tensor, limit: float) -> Tensor:
    """What a value lacks of the target behind a rectifier that cuts below zero and above `limit`."""
    gap = torch.where(target <= 0, -value.clamp(min=0), target - value)
    return torch.where(target >= limit, (limit - value).clamp(min=0), gap)


def as_columns(weight: Tensor, groups: int) -> Tensor:
    """A weight `(out, columns, ...)` in the order of `read_patches`: `(groups, taps * columns, out / groups)`."""
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1).permute(0, 3, 2, 1).flatten(1, 2)


def read_patches(layer: nn.Module, images: Tensor, stays: Tensor, groups: int = 1) -> Tensor:
    """What a layer multiplies its weight with: `(groups, positions, taps * kept + 1)`, the last column one.

    Args:
        layer: a Linear or convolution, or a subclass whose forward is linear in its weight.
        images: its input.
        stays: `(columns,)`, the columns, counted over all groups, that are read.
        groups: of the convolution.
    """
    if isinstance(layer, nn.Linear):
        images = images if bool(stays.all()) else images[..., stays]
        parts = [images if type(layer) is nn.Linear else _probe(layer, images, torch.eye(images.shape[-1]))]
    else:
        images = images if bool(stays.all()) else images[:, stays]
        parts = _taps(layer, images)
    ones = parts[0].new_ones(()).expand(*parts[0].shape[:-1], groups, 1)
    parts = [part.unflatten(-1, (groups, -1)) for part in parts]
    return torch.cat([*parts, ones], dim=-1).flatten(0, -3).transpose(0, 1)


def correlate(layer: nn.Module, images: Tensor, gap: Tensor, stays: Tensor) -> Tensor:
    """The patches' transpose times a tensor like the layer's output: `(groups, taps * kept + 1, out / groups)`.

    It is what autograd gives for the weight, and takes no longer than the layer itself. Nothing else of a gradient is
    used here: the layer is linear in its weight.
    """
    groups, dim = getattr(layer, "groups", 1), 1 if isinstance(layer, CONVOLUTIONS) else gap.ndim - 1
    narrow = torch.cat(
        [part[:, own] for part, own in zip(layer.weight.chunk(groups), stays.chunk(groups), strict=True)]
    )
    images = images if bool(stays.all()) else images.movedim(dim, -1)[..., stays].movedim(-1, dim)
    probe = copy.copy(layer)
    with torch.enable_grad():
        weight = narrow.detach().requires_grad_()
        probe._parameters = {**layer._parameters, "weight": weight, "bias": None}
        (found,) = torch.autograd.grad(probe.forward(images.detach()), weight, gap)
    found = as_columns(found, groups)
    constant = gap.sum(dim=[other for other in range(gap.ndim) if other != dim])
    return torch.cat([found, constant.view(groups, 1, -1)], dim=1)


def _taps(layer: nn.Module, images: Tensor) -> list[Tensor]:
    """For each position of a convolution's kernel, the input as it lies under it: `(N, ..., channels)`, last."""
    if type(layer).__module__.startswith("torch.nn."):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = nn.functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
        images = images.movedim(1, -1).contiguous()
        spans = []
        settings = zip(images.shape[1:-1], layer.kernel_size, layer.stride, layer.dilation, strict=True)
        for size, kernel, stride, dilation in settings:
            reach = (size - dilation * (kernel - 1) - 1) // stride * stride + 1
            spans.append([slice(tap * dilation, tap * dilation + reach, stride) for tap in range(kernel)])
        return [images[(slice(None), *span)] for span in itertools.product(*spans)]
    taps = layer.weight[0, 0].numel()
    eye = torch.eye(taps, dtype=images.dtype, device=images.device).view(taps, 1, *layer.weight.shape[2:])
    sizes = {"in_channels": 1, "out_channels": taps, "groups": 1}
    each = _probe(layer, images.flatten(0, 1).unsqueeze(1), eye, **sizes)  # (N * channels, taps, ...)
    each = each.unflatten(0, images.shape[:2]).movedim(1, -1)  # (N, taps, ..., channels)
    return list(each.unbind(1))


def _probe(layer: nn.Module, images: Tensor, weight: Tensor, **sizes: int) -> Tensor:
    """What a forward of the user's own, such as another padding, does to a given weight; its hooks are not called."""
    probe = copy.copy(layer)
    probe._parameters = {**layer._parameters, "weight": weight.to(images), "bias": None}
    for name, size in sizes.items():
        setattr(probe, name, size)
    return probe.forward(images)


def factorise(gram: Tensor, penalty: Tensor) -> Tensor:
    """Cholesky factors of `(groups, p, p)` plus a diagonal `(p,)`, which grows where a matrix is singular."""
    floor = gram.diagonal(dim1=1, dim2=2).mean() * 1e-12 + torch.finfo(gram.dtype).tiny
    for power in range(16):
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag(penalty + floor * 10.0**power))
        if not info.any():
            return factor
    raise ArithmeticError("calibration statistics are not finite")


def add_columns(weight: Tensor, stays: Tensor, change: Tensor, groups: int) -> None:
    """Add `(out, taps * kept)` to the columns of a weight `(out, columns, ...)` that stay, in place."""
    taps = weight[0, 0].numel()
    change = change.view(len(weight), taps, -1).transpose(1, 2)  # (out, kept, taps)
    parts = zip(weight.chunk(groups), stays.chunk(groups), change.chunk(groups), strict=True)
    for part, own, block in parts:
        part[:, own] += block.reshape(*block.shape[:2], *weight.shape[2:])


def add_constant(layer: nn.Module, norm: nn.Module | None, shift: Tensor) -> None:
    """Add `(out,)` to a layer's output: in its bias, else in its norm's mean, else in a bias that is made for it."""
    if layer.bias is not None:
        layer.bias += shift
    elif norm is not None:
        norm.running_mean -= shift
    else:
        layer.bias = nn.Parameter(shift.clone(), requires_grad=layer.weight.requires_grad)
