"""Rules for operations that leave each neuron where it is: activations, pooling, padding, means, softmax."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nm_lightning.compression.graph.arithmetic import meet
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import constant, nobody, shrink, varying
from nm_lightning.compression.graph.nodes import where
from nm_lightning.compression.graph.rules import Call, rule
from nm_lightning.compression.structure.operations import facts_of
from nm_lightning.compression.structure.sites import NOBODY


@rule(kinds=["entry"])
def entry(follower: Follower, call: Call) -> Any:
    """Each entry for itself."""
    homogeneous = facts_of(call.operation).homogeneous
    follower.roles[call.node] = "scale" if homogeneous else f"{call.operation} is not positively homogeneous"
    return call.source if isinstance(call.value, Tensor) else nobody(call.value)


@rule("newempty", "newzeros", "newones", "newfull", "newtensor")
def make(follower: Follower, call: Call) -> Any:
    """A tensor that has no more than dtype and device from the one it is made of."""
    return nobody(call.value)


@rule(kinds=["pool"])
def pool(follower: Follower, call: Call) -> Tensor | None:
    """Over as many dimensions of space as the name says."""
    if not isinstance(call.value, Tensor):  # a pair, with the places of the largest
        return None
    return _over_space(follower, call, range(call.value.ndim - int(call.operation[-2]), call.value.ndim))


@rule("pad")
def pad(follower: Follower, call: Call) -> Tensor | None:
    """`torch.nn.functional.pad`: what it adds among the neurons is nobody's."""
    amounts = call.argument("pad", 1, ())
    space = [call.value.ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if all(constant(call.source, dim) for dim in space):
        return _over_space(follower, call, space, call.argument("value", 3, 0))
    if call.kwargs.get("mode", "constant") != "constant" or not all(isinstance(amount, int) for amount in amounts):
        return None
    for dim in range(call.value.ndim):
        if call.value.shape[dim] < call.source.shape[dim]:
            follower.hold(call.source, dim, f"channels are cut off{where(call.node)}")
    follower.roles[call.node] = "move"
    return F.pad(call.source, list(amounts), value=NOBODY)


@rule(kinds=["resample", "pad"])
def resize(follower: Follower, call: Call) -> Tensor | None:
    """Over the dimensions whose size it changes."""
    space = [dim for dim in range(call.value.ndim) if call.source.shape[dim] != call.value.shape[dim]]
    return _over_space(follower, call, space, getattr(call.layer, "value", 0))


def _over_space(follower: Follower, call: Call, space: Sequence[int], filled: Any = 0) -> Tensor | None:
    """Each channel is left where it is, if its entries are all of one neuron."""
    if not all(constant(call.source, dim) for dim in space):
        return None
    follower.roles[call.node] = "padded with a constant" if filled else "scale"
    return shrink(call.source, space).expand_as(call.value)


@rule(kinds=["reduce"])
def reduce(follower: Follower, call: Call) -> Tensor | None:
    """A mean over space or tokens, along which the neurons don't change; what is summed over stays or goes as one."""
    dims = call.argument("dim", 1)
    dims = [dims] if isinstance(dims, int) else dims or range(call.source.ndim)
    if not isinstance(call.value, Tensor):
        return None
    if not _as_one(follower, call, dims):
        return nobody(call.value)
    follower.roles[call.node] = "scale"
    shrunk = shrink(call.source, dims)
    return (shrunk if call.argument("keepdim", 2, False) else shrunk.reshape(call.value.shape)).expand_as(call.value)


@rule("max", "min")
def largest(follower: Follower, call: Call) -> Any:
    """Of two values entry by entry, or over some dimensions: then perhaps with the places, which belong to it."""
    if len(call.sources) > 1:
        return meet(follower, call)
    if isinstance(call.value, Tensor):
        return reduce(follower, call)
    found = reduce(follower, replace(call, value=call.value[0]))
    return (found, found)


@rule("viewascomplex")
def as_complex(follower: Follower, call: Call) -> Tensor:
    """Pairs along the last dimension become numbers: both of a pair stay or go as one."""
    follower.hold(call.source, -1, f"paired to complex numbers{where(call.node)}")
    follower.roles[call.node] = "move"
    return nobody(call.value) if varying(call.source) == [call.source.ndim - 1] else call.source.select(-1, 0)


@rule("viewasreal")
def as_pairs(follower: Follower, call: Call) -> Tensor:
    """Numbers become pairs again."""
    follower.roles[call.node] = "move"
    return call.source.unsqueeze(-1).expand_as(call.value)


@rule("softmax", "logsoftmax", "normalize")
def over_one_dimension(follower: Follower, call: Call) -> Tensor | None:
    """Over tokens; neurons that it mixes stay or go as one, as those of a head."""
    dim = getattr(call.layer, "dim", call.argument("dim", *((2, 1) if call.operation == "normalize" else (1,))))
    if dim is None:
        return None
    follower.roles[call.node] = f"{call.operation} is not positively homogeneous"
    return call.source if _as_one(follower, call, [dim]) else nobody(call.value)


def _as_one(follower: Follower, call: Call, dims: Sequence[int]) -> bool:
    """Tie what an operation mixes along some dimensions; False if nothing is left that can shrink."""
    for dim in dims:
        follower.hold(call.source, dim, f"mixed by {call.operation}{where(call.node)}")
    return not varying(call.source) or not {dim % call.source.ndim for dim in dims} >= set(varying(call.source))


@rule(kinds=["assign"])
def assign(follower: Follower, call: Call) -> Any:
    """`x[...] = y`."""
    for source in call.sources:
        follower.freeze(source, f"it is written into{where(call.node)}")
    return nobody(call.value)
