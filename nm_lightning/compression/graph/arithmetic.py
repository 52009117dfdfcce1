"""Rules for operations in which neurons meet: sums, products, what is put side by side, matrix products, attention."""

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import (
    Product,
    along,
    canonical,
    compact,
    constant,
    is_nobodys,
    lay_along,
    nobody,
    shrink,
    varying,
)
from nm_lightning.compression.graph.nodes import operation_name, where
from nm_lightning.compression.graph.rules import Call, rule
from nm_lightning.compression.structure.operations import facts_of
from nm_lightning.compression.structure.sites import NOBODY, Member

# operations that may lie between a parameter and its neighbour
ON_THE_WAY = {"getitem", "narrow", "select", "squeeze", "unsqueeze", "expand", "permute", "transpose", "movedim", "t"}
ON_THE_WAY |= {"to", "float", "detach", "view", "reshape", "flatten", "contiguous"}


@rule(kinds=["sum", "product", "quotient"])
def combine(follower: Follower, call: Call) -> Tensor | None:
    """A sum or product of two values: neurons that meet in one entry are tied."""
    value, sources = call.value, call.sources[:2]
    if not isinstance(value, Tensor):
        return None
    additive = facts_of(call.operation).kind == "sum"
    if len(sources) < 2:
        follower.roles[call.node] = _role_with_constant(call, divisor=not isinstance(call.argument("input", 0), Tensor))
        return sources[0].expand_as(value)
    both = [source.expand_as(value) for source in sources]
    if all(map(is_nobodys, both)):
        return both[0]
    changes = [varying(source) for source in both]
    for this, that in ((0, 1), (1, 0)):
        # what is broadcast along the neurons, as a mask over space is, or along heads, asks nothing of their number
        padded = (1,) * (value.ndim - sources[that].ndim) + tuple(sources[that].shape)
        held = [dim for dim in changes[this] if padded[dim] != 1]
        if not changes[that] and len(held) < len(changes[this]) and not (held and additive):
            for dim in held:
                follower.hold(both[this], dim, f"{call.operation} by a table of its places{where(call.node)}")
            role = _role_with_constant(call, divisor=this == 1)
            if not is_nobodys(both[that]):
                role = "added to other neurons" if additive else "multiplied by other neurons"
            follower.roles[call.node] = role
            return both[this]
    dims = set(changes[0]) | set(changes[1])
    for that in range(2):
        if len(dims) == 1 and not changes[that] and len(call.args) > that:
            both[that] = _bind(follower, call, call.node.args[that], next(iter(dims)), both[that])
    first, second = both
    if torch.equal(compact(first).expand_as(value), compact(second).expand_as(value)):
        follower.roles[call.node] = "scale" if additive else "multiplied by itself"
        return first
    parameter = any(map(follower.is_parameter, both))
    role = f"{'added to' if additive else 'multiplied by'} {'a parameter' if parameter else 'other neurons'}"
    follower.roles[call.node] = role
    follower.tie(first, second, role, additive=additive and not parameter)
    known, other = (second, first) if follower.is_parameter(first) else (first, second)
    if parameter:  # a stream goes by the neurons of its layers
        return torch.where(compact(known) == NOBODY, compact(other), compact(known)).expand_as(value)
    return torch.maximum(compact(first), compact(second)).expand_as(value)


def _role_with_constant(call: Call, divisor: bool) -> str:
    """What a constant does to the neurons, or they to it if they are the divisor."""
    kind = facts_of(call.operation).kind
    if kind == "quotient" and divisor:
        return "it divides a constant"
    return "a constant is added" if kind == "sum" else "scale"


def _bind(follower: Follower, call: Call, given: fx.Node, dim: int, unbound: Tensor) -> Tensor:
    """A parameter with several long dimensions, where its neighbour tells which one is the channels'.

    It may be cut, transposed and the like on the way, and each entry changed for itself.

    Args:
        follower: who follows.
        call: the one that reads it.
        given: what it reads.
        dim: the neurons' in the call's value.
        unbound: what is known of it yet, in the value's shape.
    """
    node, steps = _parameter_behind(follower, given)
    if node is None:
        return unbound
    own = dim - (call.value.ndim - follower.recorder.values[given].ndim)
    if own < 0:
        return unbound
    tensor = follower.recorder.values[node]
    if facts_of(call.operation).kind in ("sum", "move") and not isinstance(tensor, nn.Parameter):
        return unbound  # fixed positions say something where a layer says nothing, and no criterion sees them
    seen = (user for each in (node, *steps[:-1]) for user in each.users)
    if not tensor.is_floating_point() or any(user in follower.origins and user not in steps for user in seen):
        return unbound
    for axis in range(tensor.ndim):
        places = {node: lay_along(torch.arange(tensor.shape[axis]), axis, tensor.ndim).expand_as(tensor)}
        for step in steps:
            places[step] = _placed(follower, step, places)
        found = places[given]
        if varying(found) == [own] and torch.equal(along(found, own), torch.arange(call.value.shape[dim])):
            name = follower.name_of(tensor, node.target)
            follower.origins[node] = follower.bind(replace(call, node=node, value=tensor), name, axis)
            for step in steps:
                follower.step(step)
            return follower.origins[given].expand_as(unbound)
    return unbound


def _parameter_behind(follower: Follower, given: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The one parameter that a value is made of, and the steps in between, in order; None where there is more to it."""
    steps, roots, ahead = set(), set(), [given]
    while ahead:
        node = ahead.pop()
        if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_method", "call_function"):
            return None, []
        if node.op == "get_attr":
            roots.add(node)
        elif node not in steps:
            if not (_moves(node) or _entrywise(node) or _resizes(node) or _joins(node)):
                return None, []
            steps.add(node)
            ahead += node.args[0] if _joins(node) else node.args[:1]
    known = len(roots) == 1 and all(isinstance(follower.recorder.values.get(step), Tensor) for step in steps)
    return (roots.pop(), [node for node in follower.graph.nodes if node in steps]) if known else (None, [])


def _placed(follower: Follower, step: fx.Node, places: dict[fx.Node, Tensor]) -> Tensor:
    """Which place along a parameter's axis each entry of a step's value comes from; -1 where it is several."""
    if _joins(step):
        dim = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else 0)
        return torch.cat([places[part] for part in step.args[0]], dim)
    given, shape = places[step.args[0]], follower.recorder.values[step].shape
    if _resizes(step):
        changed = [dim for dim in range(given.ndim) if given.shape[dim] != shape[dim]]
        alike = all(constant(given, dim) for dim in changed)
        return shrink(given, changed).expand(shape) if alike else torch.full(shape, -1)
    return follower.moved(step, given) if _moves(step) else given


def _moves(node: fx.Node) -> bool:
    return operation_name(node, None) in ON_THE_WAY


def _resizes(node: fx.Node) -> bool:
    return facts_of(operation_name(node, None)).kind == "resample"


def _joins(node: fx.Node) -> bool:
    return (
        operation_name(node, None) in ("cat", "concat") and bool(node.args) and isinstance(node.args[0], (list, tuple))
    )


def _entrywise(node: fx.Node) -> bool:
    return node.op != "call_module" and facts_of(operation_name(node, None)).kind == "entry"


@rule("cat", "concat")
def concatenate(follower: Follower, call: Call) -> Tensor:
    """`torch.cat`, without writing out the repetitions that all parts share.

    Along a dimension where no part changes its neurons (tokens, space), the parts are the same neurons. A parameter
    with several long dimensions, as tokens that are put before the others, is bound there.
    """
    follower.roles[call.node] = "move"
    parts, dim = [*call.origins[0][0]], call.argument("dim", 1, 0)
    dim %= parts[0].ndim
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dims = next(filter(None, map(varying, parts)), [])
    if len(dims) == 1 and dim not in dims:
        for place, given in enumerate(call.symbol("tensors", 0)):
            if is_nobodys(parts[place]):
                parts[place] = _bind(follower, call, given, dims[0], parts[place])
    if dims and dim not in dims and all(varying(part) == dims for part in parts):
        for part in parts[1:]:
            follower.tie(shrink(parts[0], [dim]), shrink(part, [dim]), "put side by side", additive=True)
        return canonical(shrink(parts[0], [dim]).expand(shape))
    shared = [d for d in range(len(shape)) if d != dim and all(part.stride(d) == 0 for part in parts)]
    return canonical(torch.cat([shrink(part, shared) for part in parts], dim).expand(shape))


@rule("matmul", "bmm")
def matrix_product(follower: Follower, call: Call) -> Tensor | None:
    """`first @ second`."""
    if len(call.sources) != 2 or min(source.ndim for source in call.sources) < 2:
        return None
    follower.roles[call.node] = "multiplied by other neurons"
    return _matmul(follower, call, *call.sources)


@rule("scaleddotproductattention")
def attention(follower: Follower, call: Call) -> Tensor | None:
    """`softmax(query @ key.T) @ value`; several heads of queries may share one of keys and values."""
    if len(call.sources) < 3:
        return None
    query, key, value = call.sources[:3]
    rooted = call.argument("scale", 6) is None
    if rooted and not follower.shortens(call):
        follower.hold(query, -1, f"attention is scaled by its number{where(call.node)}")
    if query.ndim > 3 and key.shape[-3] < query.shape[-3]:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    given = call.symbol("attn_mask", 3)
    biased = isinstance(given, fx.Node) and not follower.shortens(call)
    if biased and query.ndim == 4 and follower.origins[given].ndim in (3, 4):
        mask = follower.origins[given]
        if is_nobodys(mask) and mask.shape[-3] > 1 and not constant(query, 1):
            mask = _bind(follower, call, given, 1, mask)
        if not constant(mask, -3):  # a bias for each head
            follower.tie(shrink(query, [-2, -1]), shrink(mask, [-2, -1]), "added to an attention")
    follower.roles[call.node] = "attention is not positively homogeneous"
    scores = _matmul(follower, call, query, key.transpose(-1, -2), rooted)
    return _matmul(follower, call, scores, value)


@rule(kinds=["meet"])
def meet(follower: Follower, call: Call) -> Tensor | None:
    """Values that are compared, chosen or filled entry by entry: neurons that meet in one are tied."""
    if not isinstance(call.value, Tensor):
        return None
    met, *others = call.sources
    for other in others:
        known = call if len(call.sources) == 2 else replace(call, args=())
        met = combine(follower, replace(known, sources=[met, other]))
    follower.roles[call.node] = f"{call.operation} is not positively homogeneous"
    return met.expand_as(call.value)


@rule("glu")
def gated(follower: Follower, call: Call) -> Tensor:
    """One half times what the other lets through: equally many of each stay, and the same."""
    dim = getattr(call.layer, "dim", call.argument("dim", 1, -1))
    if not follower.whole(call.source, dim):
        follower.quota(follower.settle(call.source, dim), 2)
    first, second = call.source.chunk(2, dim)
    follower.roles[call.node] = "multiplied by other neurons"
    follower.tie(first, second, follower.roles[call.node])
    return canonical(torch.maximum(first, second))


@rule("einsum")
def einsum(follower: Follower, call: Call) -> Tensor | None:
    """`torch.einsum` without a letter twice in one operand: of several, one after the other."""
    words = _words(call.args[0], call.sources) if isinstance(call.args[0], str) else None
    if words is None:
        return None
    *words, result = words
    if len(words) == 1:
        return _permuted_sum(follower, call, words[0], result)
    order = [*result, *dict.fromkeys(letter for word in words for letter in word if letter not in result)]

    def spread(neurons: Tensor, word: str) -> Tensor:
        neurons = neurons.permute([word.index(letter) for letter in order if letter in word])
        for dim, letter in enumerate(order):
            neurons = neurons if letter in word else neurons.unsqueeze(dim)
        return neurons

    left, *others = map(spread, call.sources, words)
    met = words[0]
    for number, right in enumerate(others, 1):
        met += words[number]
        later = result + "".join(words[number + 1 :])
        dims = [dim for dim, letter in enumerate(order) if letter in met and letter not in later]
        left = _contract(follower, call, left, right, dims)
    follower.roles[call.node] = "multiplied by other neurons"
    return left.flatten(len(result)).squeeze(-1) if len(order) > len(result) else left


def _words(equation: str, sources: list[Tensor]) -> list[str] | None:
    """The letters of each operand and of the result, those that dots stand for too; None where one comes twice."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    words, dots = inputs.split(","), ""
    if len(words) != len(sources):
        return None
    for number, (word, source) in enumerate(zip(words, sources, strict=True)):
        if "..." in word:
            own = "".join(chr(0x100 + dim) for dim in range(source.ndim - len(word) + 3))[::-1]  # from the right
            words[number], dots = word.replace("...", own), max(dots, own, key=len)
    if not arrow:
        letters = "".join(words)
        result = dots + "".join(sorted(each for each in {*letters} - {*dots} if letters.count(each) == 1))
    words.append(result.replace("...", dots))
    return words if all(len({*word}) == len(word) for word in words) else None


def _permuted_sum(follower: Follower, call: Call, word: str, result: str) -> Tensor:
    """One operand, summed over the letters that the result has not."""
    source = call.source
    dims = [dim for dim, letter in enumerate(word) if letter not in result]
    for dim in dims:
        follower.hold(source, dim, f"summed over in einsum{where(call.node)}")
    follower.roles[call.node] = "scale" if dims else "move"
    if dims and {*varying(source)} <= {*dims}:
        return nobody(call.value)
    left = [letter for letter in word if letter in result]
    source = shrink(source, dims).reshape([source.shape[word.index(letter)] for letter in left]) if dims else source
    return source.permute([left.index(letter) for letter in result])


def _matmul(follower: Follower, call: Call, first: Tensor, second: Tensor, rooted: bool = False) -> Tensor:
    """`(..., a, b) @ (..., b, c)`, divided by the root of `b` or not."""
    return _contract(follower, call, first.unsqueeze(-1), second.unsqueeze(-3), [-2], rooted).squeeze(-2)


def _contract(
    follower: Follower, call: Call, left: Tensor, right: Tensor, dims: list[int], rooted: bool = False
) -> Tensor:
    """A product summed over `dims`: what is summed stays or goes as one, with what it is multiplied by.

    Where heads get shorter, what is summed stays or goes with what it is multiplied by, each for itself.
    """
    left, right = torch.broadcast_tensors(left, right)
    if len(dims) == 1 and not any(constant(factor, dims[0]) for factor in (left, right)):
        sides = tuple(_by_heads(factor, dims[0]) for factor in (left, right))
        follower.facts.products.append(Product(call.node, call.node.meta.get("module"), sides, rooted))
        if follower.shortens(call):
            follower.tie(left, right, "multiplied in a matrix product")
            return nobody(shrink(left, dims))
    if any(varying(factor) and not varying(shrink(factor, dims)) for factor in (left, right)):  # one head: it stays
        left, right = (_summed(follower, factor, dims) for factor in (left, right))
    for factor in (left, right):
        follower.tie(factor, shrink(factor, dims), "summed over in a matrix product")
    left, right = shrink(left, dims), shrink(right, dims)
    if follower.shortens(call) and is_nobodys(left) and varying(right):
        mixed = (_by_heads(right, varying(right)[-1]),)
        follower.facts.products.append(Product(call.node, call.node.meta["module"], mixed))
    shape, (left, right) = left.shape, map(compact, (left, right))
    if varying(left) and varying(right) and not set(varying(left)) & set(varying(right)):  # each with each: one stays
        left, right = _one_that_stays(follower, call, left, right)
    first, second = torch.where(left == NOBODY, right, left), torch.where(right == NOBODY, left, right)
    follower.tie(first, second, "multiplied in a matrix product")
    return first.expand(shape)


def _by_heads(neurons: Tensor, dim: int) -> Tensor:
    """`(heads, d)`, with `d` along `dim`."""
    neurons = neurons.movedim(dim, -1)
    return shrink(neurons, set(range(neurons.ndim - 1)) - set(varying(neurons))).reshape(-1, neurons.shape[-1])


def _summed(follower: Follower, factor: Tensor, dims: list[int]) -> Tensor:
    """A factor whose neurons stay if they lie along `dims`, over which is summed: then the product is not theirs."""
    if all(constant(factor, dim) for dim in dims):
        return factor
    follower.freeze(factor, "summed over in a matrix product")
    return nobody(factor)


def _one_that_stays(follower: Follower, call: Call, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose neurons all meet: those of which there are fewer stay, in the narrow network the same ones."""
    home, at = call.node.meta["module"], {side: f" {side} of {call.node.name}" for side in ("left", "right")}
    if follower.before:
        side = "left" if (home, f"channels{at['left']}") in follower.before else "right"
    else:
        side = "left" if left.numel() <= right.numel() else "right"
    stays = left if side == "left" else right
    follower.freeze(stays, "multiplied by each of other neurons")
    follower.see(call, Member(home, "channels", [], {}, stays.flatten().unique()), at[side])
    return (nobody(left), right) if side == "left" else (left, nobody(right))
