"""Rules for operations that only move entries: they are executed on the neurons.

What they say about sizes becomes constraints: a length written as a number in the user's code can't shrink.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import along, canonical, constant, shrink, varying
from nm_lightning.compression.graph.rules import Call, rule
from nm_lightning.compression.graph.tracer import where
from nm_lightning.compression.structure.sites import Member


@rule(kinds=["move"])
def move(follower: Follower, call: Call) -> Any:
    """The operation itself, on the neurons."""
    follower.roles[call.node] = "move"
    moved, options = call.origins
    if call.node.op == "call_module":
        result = call.layer(*moved, **options)
    elif call.node.op == "call_method":
        method = "reshape" if call.operation == "view" else call.node.target  # neurons lie otherwise in memory
        result = getattr(moved[0], method)(*moved[1:], **options)
    else:
        result = call.node.target(*moved, **options)
    return pytree.tree_map_only(Tensor, canonical, result)


@rule("cat", "concat")
def concatenate(follower: Follower, call: Call) -> Tensor:
    """`torch.cat`, without writing out the repetitions that all parts share.

    Along a dimension where no part changes its neurons (tokens, space), the parts are the same neurons.
    """
    follower.roles[call.node] = "move"
    parts, dim = call.origins[0][0], call.argument("dim", 1, 0)
    dim %= parts[0].ndim
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dims = varying(parts[0])
    if dims and dim not in dims and all(varying(part) == dims for part in parts):
        for part in parts[1:]:
            follower.tie(shrink(parts[0], [dim]), shrink(part, [dim]), "put side by side", additive=True)
        return canonical(shrink(parts[0], [dim]).expand(shape))
    shared = [d for d in range(len(shape)) if d != dim and all(part.stride(d) == 0 for part in parts)]
    return canonical(torch.cat([shrink(part, shared) for part in parts], dim).expand(shape))


@rule("chunk", "split")
def split(follower: Follower, call: Call) -> Any:
    """Parts of equal length, of which equally many neurons stay; no part's length may be a number."""
    node, result, source = call.node, move(follower, call), call.origins[0][0]
    dim = call.argument("dim", 2, 0)
    if not isinstance(source, Tensor) or constant(source, dim):
        return result
    counted = all(isinstance(size, fx.Node) for size in pytree.tree_leaves(node.args[1:2]))
    if call.operation == "split" and not counted:
        follower.freeze(source, f"split by sizes given as numbers{where(node)}")
    elif len({part.shape[dim] for part in result}) > 1:
        follower.freeze(source, f"split into unequal parts{where(node)}")
    else:
        follower.quota(follower.settle(source, dim), len(result))
    return result


@rule("reshape", "view", "unflatten")
def reshape(follower: Follower, call: Call) -> Tensor:
    """A dimension whose size is a number in the user's code keeps its size."""
    result = move(follower, call)
    sizes, offset = _sizes(call, result.ndim)
    if len(sizes) + offset > result.ndim or not sizes or isinstance(sizes[0], torch.Size):
        return result
    told = {offset + i for i, size in enumerate(sizes) if isinstance(size, int) and size != -1}
    dims = varying(result)
    free, held = [dim for dim in dims if dim not in told], [dim for dim in dims if dim in told]
    for dim in free:
        measured = _measured(follower, sizes[dim - offset]) if 0 <= dim - offset < len(sizes) else None
        if measured is not None and len(measured) == result.shape[dim]:
            neurons = follower.settle(result, dim)
            if not torch.equal(neurons.sort().values, measured.sort().values):  # not the same in another order
                follower.tie(neurons, measured, f"as many as other neurons{where(call.node)}", additive=True)
    if not held:
        return result
    free = free or _told_by_attributes(follower, call, result, held)
    held = [dim for dim in held if dim not in free]
    if not free or any(free[0] < dim < free[-1] for dim in held):
        listed = ", ".join("?" if isinstance(size, fx.Node) else str(size) for size in sizes)
        reason = f"reshaped to ({listed}), which carries a channel count as a number{where(call.node)}"
        follower.freeze(result, reason)
        return result
    for dim in held:  # before the free ones: the same stay at each index; behind them: whole blocks stay or go
        follower.tie(result, result.narrow(dim, 0, 1).expand_as(result), f"reshaped in blocks{where(call.node)}")
    return result


def _sizes(call: Call, ndim: int) -> tuple[list, int]:
    """The sizes as the user's code gives them, nodes where it computes them, and the dimension of the first."""
    if call.layer is not None:
        sizes, dim = list(call.layer.unflattened_size), call.layer.dim
    elif call.operation == "unflatten":
        sizes, dim = list(call.node.args[2]), call.node.args[1]
    else:
        sizes, dim = list(call.node.args[1:]), 0
    if call.layer is None and len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    return sizes, dim % (ndim - len(sizes) + 1) if dim else 0


def _measured(follower: Follower, size: Any) -> Tensor | None:
    """The neurons `(n,)` along the dimension whose length a size in the graph is; None if it is no such length."""
    if not isinstance(size, fx.Node) or size.target != "size":
        return None
    origin, dim = follower.origins.get(size.args[0]), size.args[1]
    if not isinstance(origin, Tensor) or constant(origin, dim):
        return None
    return follower.settle(origin, dim)


def _told_by_attributes(follower: Follower, call: Call, result: Tensor, dims: list[int]) -> list[int]:
    """The one dimension whose size is an attribute of the module whose code this is, and can shrink with it."""
    owner = call.node.meta["module"]
    module = follower.module_named(owner)
    numbers = {name: held for name, held in vars(module).items() if type(held) is int} if module else {}
    choices = {dim: [name for name, held in numbers.items() if held == result.shape[dim]] for dim in dims}
    choices = {dim: names for dim, names in choices.items() if names}
    if not choices:
        return []
    heads = [dim for dim, names in choices.items() if any("head" in n and "dim" not in n for n in names)]
    dim = heads[-1] if heads else next(iter(choices))  # (3, heads, ...): a literal 3 comes first
    counts = dict.fromkeys(choices[dim], 1)
    member = Member(owner, "channels", [], counts, along(result, dim))
    follower.see(call, member, at=f" at {call.node.name}")
    return [dim]
