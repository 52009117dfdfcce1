"""Rules for operations that only move entries: they are executed on the neurons.

What they say about sizes becomes constraints: a length written as a number in the user's code can't shrink.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from nm_lightning.compression.graph.attributes import attributes_of, counts_heads, settings_of, tell_apart
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import along, canonical, constant, lay_along, shrink, varying
from nm_lightning.compression.graph.nodes import where
from nm_lightning.compression.graph.rules import Call, rule
from nm_lightning.compression.structure.inputs import mapped
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
    return mapped(canonical, result)


@rule("chunk", "split")
def split(follower: Follower, call: Call) -> Any:
    """Parts of equal length, of which equally many neurons stay; or parts whose lengths are the module's attributes."""
    node, result, source = call.node, move(follower, call), call.origins[0][0]
    dim = call.argument("dim", 2, 0)
    if not isinstance(source, Tensor) or follower.whole(source, dim):
        return result
    sizes = call.symbol("split_size", 1, node.kwargs.get("split_size_or_sections"))
    parts = [follower.settle(part, dim) for part in result]
    if call.operation == "split" and not isinstance(sizes, (fx.Node, int)):
        for part in _parts_that_stay(follower, call, parts, sizes):
            follower.freeze(part, f"split by sizes given as numbers{where(node)}")
    elif len({len(part) for part in parts}) > 1:
        follower.freeze(source, f"split into unequal parts{where(node)}")
    else:
        every = torch.cat(parts)
        follower.quota(every, len(parts))
        if call.operation == "split" and isinstance(sizes, int):
            known = [(_attributes(follower, call, len(owner)), owner) for owner in (parts[0], every)]
            if not any(names for names, _ in known):
                follower.freeze(source, f"split by a size given as a number{where(node)}")
            for names, owner in known:
                _note_lengths(follower, call, names, owner)
    return result


def _parts_that_stay(follower: Follower, call: Call, parts: list[Tensor], sizes: Sequence) -> list[Tensor]:
    """The parts of a split whose lengths are numbers in the user's code; the others' are noted as attributes.

    Numbers are known by their values, so parts whose length is one attribute keep equally many neurons. A part may be
    as long as other neurons are many, or have what an attribute that counts all leaves to those of the others.
    """
    lists, frozen = _attributes(follower, call, list(sizes)), []
    for place, part in enumerate(parts if lists else []):
        _note_lengths(follower, call, [f"{name}[{place}]" for name in lists], part)
    for size, part in zip(sizes, parts, strict=True):
        if isinstance(size, fx.Node) and (measured := _measured(follower, size)) is not None:
            follower.tie(part, measured, f"as many as other neurons{where(call.node)}", additive=True)
    known = {size: _attributes(follower, call, size) for size in dict.fromkeys(sizes) if isinstance(size, int)}
    others = [size for size, names in known.items() if not names]
    total = _attributes(follower, call, sum(map(len, parts))) if [*map(type, sizes)].count(int) == len(parts) else []
    if total and not lists and len(others) == 1 < len(parts) and [*sizes].count(others[0]) == 1:
        _note_lengths(follower, call, total, torch.cat(parts))
        rest = parts[[*sizes].index(others[0])]
        follower.see(call, Member(call.node.meta["module"], "channels", [], {}, rest), f" rest of {total}")
        del known[others[0]]
    for size, names in known.items():
        alike = [part for part, other in zip(parts, sizes, strict=True) if type(other) is int and other == size]
        if not lists and not names:
            frozen += alike
        if len(alike) > 1 and names:
            follower.quota(torch.cat(alike), len(alike))
        _note_lengths(follower, call, names, alike[0])
    return frozen


def _attributes(follower: Follower, call: Call, value: int | list[int]) -> list[str]:
    """Those of the module whose code this is."""
    return attributes_of(follower.module_named(call.name or call.node.meta["module"]), value)


def _note_lengths(follower: Follower, call: Call, paths: list[str], owner: Tensor) -> None:
    """Each of these attributes is as long as the neurons `owner` are many, wherever it is read."""
    for path in paths:
        member = Member(call.node.meta["module"], "channels", [], {path: 1}, owner)
        follower.see(call, member, f" in {path}")


@rule("repeatinterleave")
def repeat(follower: Follower, call: Call) -> Tensor | None:
    """Each entry so many times: along the neurons by a number in the user's code, elsewhere by any number."""
    dim, repeats = call.argument("dim", 2), call.symbol("repeats", 1)
    if dim is None or isinstance(call.argument("repeats", 1), Tensor):
        return None
    if constant(call.source, dim):
        follower.roles[call.node] = "move"
        return shrink(call.source, [dim]).expand(call.value.shape)
    if not isinstance(repeats, int):
        return None
    follower.roles[call.node] = "move"
    return canonical(call.source.repeat_interleave(repeats, dim))


@rule("unfold")
def unfold(follower: Follower, call: Call) -> Tensor | None:
    """Windows of an image, `(N, C, ...)` to `(N, C x places in a window, windows)`."""
    if call.node.op == "call_method":  # a tensor's own, along any dimension
        return None
    follower.roles[call.node] = "move"
    neurons = follower.settle(call.source, 1).repeat_interleave(call.value.shape[1] // call.source.shape[1])
    return neurons[:, None].expand_as(call.value)


@rule("fold")
def fold(follower: Follower, call: Call) -> Tensor:
    """The windows' sum: the places of a channel are one neuron's."""
    places = call.source.shape[-2] // call.value.shape[-3]
    source = follower.settle(call.source, -2)
    neurons = follower.tie_runs(source, places, f"summed over windows{where(call.node)}")
    follower.roles[call.node] = "scale"
    return lay_along(neurons, call.value.ndim - 3, call.value.ndim).expand_as(call.value)


@rule("channelshuffle")
def shuffle(follower: Follower, call: Call) -> Tensor:
    """Groups of channels that are interleaved: equally many of each stay."""
    follower.quota(follower.settle(call.source, 1), getattr(call.layer, "groups", call.argument("groups", 1)))
    return move(follower, call)


@rule("getitem", "narrow", "select", "unbind", "roll")
def pick(follower: Follower, call: Call) -> Any:
    """What is taken by its place among the neurons, or moved by so many places, keeps their number.

    Unless a slice is one of several equal parts, its bounds grow with the number of neurons, and what stays is tied to
    what stays in the other parts, as in a gated unit; or unless its bounds are attributes of the module.
    """
    source = call.origins[0][0]
    if not isinstance(source, Tensor):
        return move(follower, call)  # a part of a tuple
    places = _places(call, source)
    along_neurons = call.operation != "roll" and varying(source) in [[dim] for dim, _ in places]  # not q, k and v
    for dim, bounds in places:
        if bounds is not None and not follower.whole(source, dim) and _told_bounds(follower, call, source, dim, bounds):
            continue
        if along_neurons:
            follower.apart.add(call.node)
        parts = 0 if bounds is None or constant(source, dim) else _equal_parts(follower, source, dim, *bounds)
        reason = f"channels are taken by their place{where(call.node)}"
        if parts and not (along_neurons and parts == source.shape[dim]):
            follower.quota(follower.settle(source, dim), parts, reason)
        elif not follower.shortens(call) or dim == source.ndim - 1:  # queries, keys and values
            follower.hold(source, dim, reason)
    index = call.args[1] if len(call.args) > 1 else None
    if any(isinstance(each, Tensor) for each in (index if isinstance(index, tuple) else (index,))):
        return _indexed(call, source, index)
    return move(follower, call)


def _told_bounds(follower: Follower, call: Call, source: Tensor, dim: int, bounds: tuple) -> bool:
    """Whether a slice's bounds are attributes of the module, as `x[:, self.n:]`: each cuts the neurons in two parts."""
    given = {bound: _attributes(follower, call, abs(bound)) for bound in bounds if type(bound) is int and bound}
    if len(given) < sum(bound not in (None, 0) for bound in bounds) or not all(given.values()):
        return False
    neurons = follower.settle(source, dim)
    if any(abs(bound) >= len(neurons) for bound in given):
        return False
    for bound, names in given.items():
        parts = (neurons[:bound], neurons[bound:])
        _note_lengths(follower, call, names, parts[bound < 0])
        follower.see(call, Member(call.node.meta["module"], "channels", [], {}, parts[bound > 0]), f" not in {names}")
    return True


def _indexed(call: Call, source: Tensor, index: Any) -> Tensor | None:
    """By tensors of places: along dimensions where all places are alike, any places do."""
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in index):
        return None
    places = [torch.zeros(each.shape, dtype=torch.long) if isinstance(each, Tensor) else each for each in index]
    moved = canonical(source[tuple(places)])
    return moved if moved.shape == call.value.shape else None


def _places(call: Call, source: Tensor) -> list[tuple[int, tuple | None]]:
    """The dimensions along which a call takes a part, with the bounds of a slice as the graph has them."""
    if call.operation == "roll":
        dims = call.argument("dims", 2) or range(source.ndim)
        return [(dim, None) for dim in ([dims] if isinstance(dims, int) else dims)]
    if call.operation != "getitem":
        return [(call.argument("dim", 1, 0), None)]
    values, symbols = (each[1] if isinstance(each[1], tuple) else (each[1],) for each in (call.args, call.node.args))
    count = sum(each is not None and each is not ... for each in values)
    found, dim = [], 0
    for value, symbol in zip(values, symbols, strict=True):
        if value is ...:
            dim += source.ndim - count
        elif value is not None:
            whole = isinstance(value, slice) and value.indices(source.shape[dim]) == (0, source.shape[dim], 1)
            if not whole:
                step = value.step if isinstance(value, slice) else 0
                found.append((dim, (symbol.start, symbol.stop) if step in (None, 1) else None))
            dim += 1
    return found


def _equal_parts(follower: Follower, source: Tensor, dim: int, start: Any, stop: Any) -> int:
    """How many equal parts there are, if a slice is always one of them however many neurons there are; else 0."""
    size, neurons = source.shape[dim], along(source, dim)

    def bound(symbol: Any, length: int) -> int:
        """A bound if the dimension were so long."""
        if not isinstance(symbol, fx.Node):
            return symbol
        measured = _measured(follower, symbol)
        if measured is not None and torch.equal(measured, neurons):
            return length
        return symbol.target(*(bound(each, length) for each in symbol.args))

    def limits(length: int) -> tuple[int, int]:
        return slice(bound(start, length), bound(stop, length)).indices(length)[:2]

    try:
        low, high = limits(size)
        if low >= high or size % (high - low) or low % (high - low):
            return 0
        parts, here = size // (high - low), low // (high - low)
        ways = ((limits(parts * each), (here * each, (here + 1) * each)) for each in range(1, high - low))
        return parts if all(found == wanted for found, wanted in ways) else 0
    except TypeError:  # computed from something else
        return 0


@rule("reshape", "view", "unflatten")
def reshape(follower: Follower, call: Call) -> Tensor:
    """A dimension whose size is a number in the user's code keeps its size."""
    result = move(follower, call)
    sizes, offset = _sizes(call, result.ndim)
    if len(sizes) + offset > result.ndim or not sizes or isinstance(sizes[0], torch.Size):
        return result
    told = {
        offset + i for i, size in enumerate(sizes) if (isinstance(size, int) and size != -1) or _fixed(follower, size)
    }
    dims = varying(result)
    if _cut_into_heads(follower, call, result, sizes[result.ndim - 1 - offset :]):
        return result
    free, held = [dim for dim in dims if dim not in told], [dim for dim in dims if dim in told]
    for dim in free:
        measured = _measured(follower, sizes[dim - offset]) if 0 <= dim - offset < len(sizes) else None
        if measured is not None and len(measured) == result.shape[dim]:
            neurons = follower.settle(result, dim)
            if not torch.equal(neurons.sort().values, measured.sort().values):  # not the same in another order
                reason = f"as many as other neurons{where(call.node)}"
                follower.tie(follower.in_order(neurons), follower.in_order(measured), reason, additive=True)
    if not held:
        return result
    size = sizes[free[0] - offset] if len(free) == 1 and 0 <= free[0] - offset < len(sizes) else -1
    if not free or size == -1 or _divided(follower, size) is not None:
        heads = _told_by_attributes(follower, call, result, held, sorted(told), heads=bool(free))
        if heads and free and size != -1:
            _tie_to_heads(follower, call, result, heads[0], _divided(follower, size))
        free = heads or free
    held = [dim for dim in dims if dim not in free]
    if not free or any(free[0] < dim < free[-1] for dim in held):
        listed = ", ".join("?" if isinstance(size, fx.Node) else str(size) for size in sizes)
        reason = f"reshaped to ({listed}), which carries a channel count as a number{where(call.node)}"
        follower.freeze(result, reason)
        return result
    for dim in held:  # before the free ones: the same stay at each index; behind them: whole blocks stay or go
        follower.tie(result, result.narrow(dim, 0, 1).expand_as(result), f"reshaped in blocks{where(call.node)}")
    return result


def _cut_into_heads(follower: Follower, call: Call, result: Tensor, size: list) -> bool:
    """Whether it lays heads side by side that get shorter: equally many of each one's last dimensions stay.

    Args:
        follower: who follows.
        call: the reshape.
        result: its neurons.
        size: that of the last dimension as the user's code gives it; empty where it does not.
    """
    owner, last = call.node.meta.get("module"), result.ndim - 1
    key = (owner, f"channels at {call.node.name}")
    before, dims = follower.before.get(key), varying(result)
    if not follower.shortens(call) or (before is None and (len(dims) < 2 or dims[-1] != last)):
        return False
    heads = shrink(result, set(range(last)) - set(dims)).reshape(-1, result.shape[last])
    follower.quota(heads.flatten(), len(heads))
    names = [name for name in _attributes(follower, call, heads.shape[1]) if not name.endswith("heads")]
    told = bool(size) and isinstance(size[0], int) and size[0] != -1
    if bool(size) and before is None and ((told and not names) or isinstance(size[0], fx.Node)):
        follower.freeze(result, f"reshaped to heads whose length is a number{where(call.node)}")
    names = ([*before.counts] if before is not None else names) if told else []
    follower.see(call, Member(owner, "channels", [], dict.fromkeys(names, 1), heads[0]), f" at {call.node.name}")
    return True


def _fixed(follower: Follower, size: Any) -> bool:
    """Whether a size in the graph is the length of a dimension that can't shrink."""
    axis = _axis(follower, size)
    return axis is not None and follower.whole(*axis)


def _divided(follower: Follower, size: Any) -> Tensor | None:
    """The neurons along the dimension that a size like `C // heads` was computed from."""
    whole = isinstance(size, fx.Node) and size.target is operator.floordiv and isinstance(size.args[1], int)
    return _measured(follower, size.args[0]) if whole else None


def _tie_to_heads(follower: Follower, call: Call, result: Tensor, dim: int, neurons: Tensor) -> None:
    """Where a head's length is a share of other neurons' number, a run of these goes with the head at its place."""
    heads = along(result, dim)
    if len(neurons) % len(heads):
        follower.freeze(result, f"heads of unequal lengths{where(call.node)}")
        return
    runs = neurons.view(len(heads), -1)
    follower.tie(heads[:, None].expand_as(runs), runs, f"as many in each head as other neurons{where(call.node)}", True)


@rule("reshapeas", "viewas")
def reshape_as(follower: Follower, call: Call) -> Tensor:
    """Neurons along a dimension are as many as the other tensor has there."""
    follower.roles[call.node] = "move"
    source, other = call.origins[0][0], call.origins[0][1]
    result = canonical(source.reshape(other.shape))
    for dim in varying(result):
        if constant(other, dim):
            follower.hold(result, dim, f"reshaped to what does not shrink{where(call.node)}")
        else:
            neurons = follower.settle(result, dim)
            follower.tie(neurons, follower.settle(other, dim), f"as many as other neurons{where(call.node)}", True)
    return result


def _sizes(call: Call, ndim: int) -> tuple[list, int]:
    """The sizes as the user's code gives them, nodes where it computes them, and the dimension of the first."""
    if call.layer is not None:
        sizes, dim = list(call.layer.unflattened_size), call.layer.dim
    elif call.operation == "unflatten":
        sizes, dim = list(call.symbol("sizes", 2)), call.symbol("dim", 1)
    else:
        sizes, dim = list(call.node.args[1:] or call.symbol("shape", 1, ())), 0
    if call.layer is None and len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    return sizes, dim % (ndim - len(sizes) + 1) if dim else 0


def _measured(follower: Follower, size: Any) -> Tensor | None:
    """The neurons `(n,)` along the dimension whose length, or a multiple of it, a size in the graph is; else None."""
    if isinstance(size, fx.Node) and size.target is operator.mul and any(isinstance(each, int) for each in size.args):
        length, times = size.args if isinstance(size.args[1], int) else size.args[::-1]
        neurons = _measured(follower, length)
        return None if neurons is None else neurons.repeat_interleave(times)
    axis = _axis(follower, size)
    return None if axis is None or follower.whole(*axis) else follower.settle(*axis)


def _axis(follower: Follower, size: Any) -> tuple[Tensor, int] | None:
    """The tensor of neurons, and its dimension with several, whose length a size in the graph is."""
    if not isinstance(size, fx.Node) or size.target != "size":
        return None
    origin, dim = follower.origins.get(size.args[0]), size.args[1]
    return (origin, dim) if isinstance(origin, Tensor) and not constant(origin, dim) else None


def _told_by_attributes(
    follower: Follower, call: Call, result: Tensor, dims: list[int], told: list[int], heads: bool
) -> list[int]:
    """The one dimension whose size is an attribute of the module whose code this is, and can shrink with it.

    It is one of `dims`, or, if only `heads` are wanted, perhaps none; in a narrowed network it is that of `told` whose
    attribute it was, even if one neuron is left.
    """
    owner, at = call.name or call.node.meta["module"], f" at {call.node.name}"
    sizes, offset = _sizes(call, result.ndim)
    before = follower.before.get((owner, f"channels{at}"))
    lists = _attributes(follower, call, list(sizes))
    choices = {}
    for dim in dims if before is None else told:
        names = [] if call.layer is not None else _attributes(follower, call, result.shape[dim])
        names += [f"{name}[{dim - offset}]" for name in lists]
        if not names or before is not None:
            names += settings_of(follower.module_named(owner), result.shape[dim])
        choices[dim] = dict.fromkeys(names, 1) or _whole_heads(follower, call, result.shape[dim])
    tell_apart(choices, result.ndim)
    if before is not None:
        known = before.counts.items()
        choices = {dim: {n: c for n, c in counts.items() if (n, c) in known} for dim, counts in choices.items()}
    choices = {dim: counts for dim, counts in choices.items() if counts}
    if not choices:
        return []
    whole = [dim for dim, names in choices.items() if any(map(counts_heads, names))]
    if heads and not whole:
        return []
    dim = whole[-1] if whole else next(iter(choices))  # (3, heads, ...): a literal 3 comes first
    neurons = along(result, dim)
    for length in choices[dim].values():
        follower.tie_runs(neurons, length, f"reshaped to whole heads{where(call.node)}")
    follower.see(call, Member(owner, "channels", [], choices[dim], neurons), at)
    return [dim]


def _whole_heads(follower: Follower, call: Call, size: int) -> dict[str, int]:
    """The module's attribute that is a number of heads, with that of their length, whose product a size is."""
    module = follower.module_named(call.node.meta["module"])
    held = vars(module).items() if module is not None else ()
    numbers = {name: value for name, value in held if type(value) is int and value > 1}
    pairs = [(first, second) for first in numbers for second in numbers if numbers[first] * numbers[second] == size]
    return {heads: numbers[length] for heads, length in pairs if counts_heads(heads) and heads != length}
