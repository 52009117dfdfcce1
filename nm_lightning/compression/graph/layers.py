"""Rules for layers: modules that hold weights, and `torch.nn.functional`'s on parameters of the user's modules."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from nm_lightning.compression.graph.attributes import attributes_of
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import along, is_nobodys, lay_along, nobody, varying
from nm_lightning.compression.graph.nodes import operation_name, where
from nm_lightning.compression.graph.rules import OWN_NORM, Call, rule
from nm_lightning.compression.structure.operations import (
    BATCH_NORMS,
    CHANNEL_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    channels_of,
)
from nm_lightning.compression.structure.sites import Member

# the functions, with the names of their arguments
FUNCTIONAL = {
    **{f"conv{d}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for d in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "batchnorm": ("input", "running_mean", "running_var", "weight", "bias"),
    "batchnorm of torch": ("input", "weight", "bias", "running_mean", "running_var"),
    "layernorm": ("input", "normalized_shape", "weight", "bias"),
    "prelu": ("input", "weight"),
}
TENSORS = ("weight", "bias", "running_mean", "running_var")


@rule(nn.Linear)
def linear(follower: Follower, call: Call) -> Tensor:
    """Reads its input's last dimension, and makes its output's."""
    dim = call.value.ndim - 1
    follower.read(call, follower.slots(call, 1, "weight"), dim, {"in_features": 1})
    return follower.produce(call, follower.slots(call, 0, "weight", "bias"), dim, {"out_features": 1})


@rule(*CONVOLUTIONS, *TRANSPOSED)
def convolution(follower: Follower, call: Call) -> Tensor:
    """Whole, grouped or depthwise."""
    layer, transposed = call.layer, isinstance(call.layer, TRANSPOSED)
    dim = call.value.ndim - layer.weight.ndim + 1
    if follower.before:  # a narrowed one is what it was: a group may be down to one channel, or all to one group
        depthwise = (call.name, "channels") in follower.before
    else:
        depthwise = 1 < layer.groups == layer.in_channels or call.name in follower.facts.as_one
    if layer.groups > 1 and transposed and (layer.out_channels > layer.in_channels or not depthwise):
        return follower.stop(call, "a grouped transposed convolution reads it")
    if depthwise:
        return _each_group_for_itself(follower, call, dim)
    rows, columns = (1, 0) if transposed else (0, 1)
    follower.read(call, follower.slots(call, columns, "weight"), dim, {"in_channels": 1}, layer.groups)
    slots = follower.slots(call, rows, "weight", "bias")
    return follower.produce(call, slots, dim, {"out_channels": 1}, layer.groups)


def _each_group_for_itself(follower: Follower, call: Call, dim: int) -> Tensor:
    """What a group reads and makes stays or goes as one, as each channel of a depthwise convolution does."""
    layer = call.layer
    channels = follower.settle(call.source, dim)
    firsts = follower.tie_runs(channels, len(channels) // layer.groups, f"{call.name} reads whole groups")
    made = layer.out_channels // layer.groups
    counts = {"out_channels": 1, "in_channels": Fraction(layer.out_channels, layer.in_channels), "groups": made}
    first = replace(call, source=lay_along(firsts, dim, call.source.ndim))
    slots = follower.slots(call, 0, "weight", "bias")
    return follower.pass_through(first, slots, dim, counts, f"{call.name} filters each group on its own", made)


@rule(nn.PReLU)
def prelu(follower: Follower, call: Call) -> Tensor:
    """A slope for all, or one for each channel."""
    if call.layer.num_parameters == 1:
        follower.roles[call.node] = "scale"
        return call.source
    role = f"{call.name} has a slope for each channel"
    return follower.pass_through(call, follower.slots(call, 0, "weight"), 1, {"num_parameters": 1}, role)


@rule(*CHANNEL_NORMS)
def channel_norm(follower: Follower, call: Call) -> Tensor:
    """Each channel for itself."""
    role = "norm" if isinstance(call.layer, BATCH_NORMS) else f"{call.name} normalises each image"
    return follower.pass_through(call, follower.slots(call, 0, *TENSORS), 1, {"num_features": 1}, role)


@rule(nn.GroupNorm)
def group_norm(follower: Follower, call: Call) -> Tensor:
    """Channels of a group together, or each for itself if there are as many groups."""
    layer, counts = call.layer, {"num_channels": 1}
    alone = layer.num_groups == layer.num_channels
    if alone:
        counts["num_groups"] = 1
    slots = follower.slots(call, 0, *TENSORS)
    followed = follower.pass_through(call, slots, 1, counts, f"{call.name} mixes channels")
    if layer.num_groups > 1 and not alone:
        follower.quota(along(call.source, 1), layer.num_groups)
    return followed


@rule(nn.LayerNorm, nn.RMSNorm)
def layer_norm(follower: Follower, call: Call) -> Any:
    """Over the last dimension, or over the channels in a subclass that moves them there."""
    shape, dims = call.layer.normalized_shape, varying(call.source)
    if len(shape) == 1 and len(dims) == 1 and call.value.shape[dims[0]] == shape[0]:
        slots = follower.slots(call, 0, *TENSORS)
        return follower.pass_through(call, slots, dims[0], {"normalized_shape": 1}, f"{call.name} mixes channels")
    if len(shape) == 1 and len(dims) > 1 and call.value.shape[-1] == shape[0]:  # each head for itself
        follower.hold(call.source, -1, f"{call.name} normalises over several dimensions")
        follower.roles[call.node] = f"{call.name} mixes channels"
        return call.source
    return follower.stop(call, f"{call.name} normalises over several dimensions") if dims else call.source


@rule(OWN_NORM)
def own_norm(follower: Follower, call: Call) -> Any:
    """A normalisation that somebody wrote out: narrow, it computes over the survivors, as torch's own do."""
    own, dims = dict(call.layer.named_parameters()), varying(call.source)
    channels = channels_of(call.layer)
    fits = call.value.shape == call.source.shape and len(call.sources) == 1
    if not dims:
        return call.source if fits else nobody(call.value)
    along_channels = fits and len(dims) == 1 and call.value.shape[dims[0]] == channels
    heads = fits and len(dims) > 1 and call.value.shape[-1] == channels
    if not along_channels and not heads:
        for source in call.sources:
            follower.freeze(source, f"{call.name} normalises over several dimensions")
        return nobody(call.value)
    if not keeps_order(call.layer, call.value.ndim, dims):
        return follower.stop(call, f"{call.name} does not treat all channels alike")
    if along_channels:
        slots = [(follower.name_of(each, f"{call.name}.{label}"), each.shape.index(channels))
                 for label, each in own.items()]  # fmt: skip
        held = [name for value in (channels, [channels]) for name in attributes_of(call.layer, value)]
        counts = dict.fromkeys(held, 1)
        return follower.pass_through(call, slots, dims[0], counts, f"{call.name} mixes channels")
    follower.hold(call.source, -1, f"{call.name} normalises over several dimensions")
    follower.roles[call.node] = f"{call.name} mixes channels"
    return call.source


@torch.no_grad()
def keeps_order(norm: nn.Module, ndim: int, dims: Sequence[int]) -> bool:
    """Whether a norm says the same of channels that come in another order, tried out on drawn numbers.

    Then it knows no channel by its place, as one in groups does. A turn and a swap make up all orders. Along several
    dimensions, of heads say, each head is for itself, and the last has the channels.

    Args:
        norm: its parameters, if any, have a number for each channel; they may be without data.
        ndim: of what it reads.
        dims: along which neurons change.
    """
    draw, dim = partial(torch.rand, generator=torch.Generator().manual_seed(0)), dims[-1]
    own = {name: draw(each.shape) + 0.5 for name, each in norm.named_parameters()}
    channels = channels_of(norm)
    shape = [3] * ndim
    shape[dim] = channels
    images, tried, turned = 2 * draw(shape) - 1, copy.deepcopy(norm), torch.arange(channels).roll(1)
    swapped = torch.cat([turned.roll(-1)[:2].flip(0), turned.roll(-1)[2:]])

    def said(own: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(tried, own, (images,))

    try:
        wanted = said(own, images)
        for order in (turned, swapped):
            other = {name: each.index_select(each.shape.index(channels), order) for name, each in own.items()}
            if not torch.allclose(said(other, images[_at(dim, order)]), wanted[_at(dim, order)], 1e-4, 1e-5):
                return False
        return all(
            torch.allclose(said(own, images.narrow(head, 1, 1)), wanted.narrow(head, 1, 1), 1e-4, 1e-5)
            for head in dims[:-1]
        )
    except Exception:  # it wants other inputs
        return False


def _at(dim: int, places: Tensor) -> tuple:
    return (*[slice(None)] * dim, places)


@rule("multiheadattention")
def multi_head_attention(follower: Follower, call: Call) -> Any:
    """`nn.MultiheadAttention` ties its inner width to its input's.

    So that both shrink by equally much, each run of `head_dim` input channels is one with the head at its place.
    """
    layer, name = call.layer, call.name
    options = dict(zip(("query", "key", "value"), call.origins[0], strict=False)) | call.origins[1]
    inputs = [options[label] for label in ("query", "key", "value")]
    plain = layer.in_proj_weight is not None and layer.bias_k is None
    if not plain or any(varying(source) not in ([], [2]) for source in inputs):
        for source in inputs:
            follower.freeze(source, f"{name}: nn.MultiheadAttention ties its inner width to embed_dim")
        return nobody(call.value)
    own = {label: follower.name_of(tensor, f"{name}.{label}") for label, tensor in layer.named_parameters()}
    reads = along(inputs[0], 2)
    for source in inputs[1:]:
        follower.tie(reads, along(source, 2), f"{name} reads them together")
    heads = follower.tie_runs(reads, layer.head_dim, f"{name} has whole heads")
    inner = heads.repeat_interleave(layer.head_dim)
    follower.see(call, Member(name, "columns", [(own["in_proj_weight"], 1)], {}, reads))
    counts = {"embed_dim": 1, "kdim": 1, "vdim": 1, "num_heads": layer.head_dim}
    follower.see(call, Member(name, "channels", [], counts, inner))
    stacked = [(own[label], 0) for label in ("in_proj_weight", "in_proj_bias") if label in own]
    follower.see(call, Member(f"{name}.in_proj", "channels", stacked, {}, inner.repeat(3)))
    out = replace(call, name=f"{name}.out_proj", value=call.value[0])
    follower.see(out, Member(out.name, "columns", [(own["out_proj.weight"], 1)], {"in_features": 1}, inner))
    rows = [(own[label], 0) for label in ("out_proj.weight", "out_proj.bias") if label in own]
    return (follower.produce(out, rows, 2, {"out_features": 1}), nobody(call.value[1]))


@rule(*(name for name in FUNCTIONAL if " " not in name))
def functional(follower: Follower, call: Call) -> Any:
    """`torch.nn.functional`'s layers."""
    node, operation = call.node, call.operation
    if node.op != "call_function":
        return None
    labels = FUNCTIONAL["batchnorm of torch" if node.target is torch.batch_norm else operation]
    given = dict(zip(labels, call.args, strict=False)) | call.kwargs
    nodes = dict(zip(labels, node.args, strict=False)) | dict(node.kwargs)
    call = replace(call, source=follower.origins[nodes["input"]])
    at = f" at {node.name}"
    alone = operation.startswith("conv") and 1 < given.get("groups", 1) == given["weight"].shape[0]
    if alone or (node.meta["module"], f"channels{at}") in follower.before:
        return _functional_filter(follower, call, nodes, at)
    tensors, bias = {}, None
    for label in TENSORS:
        argument = nodes.get(label)
        if isinstance(argument, fx.Node):
            if argument.op != "get_attr" and label == "bias" and not is_nobodys(follower.origins[argument]):
                bias = follower.origins[argument]  # put together of parameters
                continue
            if argument.op != "get_attr":
                return follower.stop(call, f"{operation} with a computed {label}{where(node)}")
            tensors[label] = follower.name_of(given[label], argument.target)
    call = replace(call, name=tensors["weight"].removesuffix(".weight") if "weight" in tensors else node.name)
    if "weight" in tensors and (operation == "linear" or operation.startswith("conv")):
        return _functional_product(follower, call, tensors, given, bias)
    if bias is not None:
        return follower.stop(call, f"{operation} with a computed bias{where(node)}")
    dims = varying(call.source)
    if not tensors:
        follower.roles[node] = f"{operation} mixes channels" if operation == "layernorm" else "scale"
        if operation == "batchnorm" or not dims:
            return call.source
        return follower.stop(call, f"{operation} without parameters{where(node)}")
    if len(dims) > 1:
        return follower.stop(call, f"{operation} over several dimensions{where(node)}")
    return _functional_channels(follower, call, tensors, dims[0]) if dims else call.source


def _functional_product(
    follower: Follower, call: Call, tensors: dict[str, str], given: dict[str, Any], bias: Tensor | None
) -> Any:
    """`linear` and the convolutions; `bias` is that of a computed one."""
    dim = call.value.ndim - 1
    if call.operation != "linear":
        dim = call.value.ndim - given["weight"].ndim + 1
        if given.get("groups", 1) > 1:
            return follower.stop(call, f"a functional grouped convolution{where(call.node)}")
    follower.read(call, [(tensors["weight"], 1)], dim)
    made = follower.produce(call, [(name, 0) for name in tensors.values()], dim)
    if bias is not None:
        follower.tie(along(made, dim), bias, f"its bias is computed{where(call.node)}")
    return made


def _functional_filter(follower: Follower, call: Call, nodes: dict[str, Any], at: str) -> Any:
    """A convolution of each channel for itself, by filters of a tensor of the network's, or by one filter for all."""
    home, groups, weight = call.node.meta["module"], nodes.get("groups", 1), nodes["weight"]
    dim, bias = call.value.ndim - follower.recorder.values[weight].ndim + 1, nodes.get("bias")
    held = attributes_of(follower.module_named(home), groups) if isinstance(groups, int) else []
    slots = [(follower.name_of(follower.recorder.values[own], own.target), 0) for own in (weight, bias)
             if isinstance(own, fx.Node) and own.op == "get_attr"]  # fmt: skip
    one = isinstance(weight, fx.Node) and operation_name(weight, None) == "expand" and bias is None
    one = one and follower.recorder.values[weight.args[0]].shape[0] == 1
    known = len(slots) == 1 + (bias is not None) or one
    channels = follower.settle(call.source, dim)
    measured = isinstance(groups, fx.Node) and groups.target == "size" and follower.measured(groups)
    same = measured and all(torch.equal(along(*each), channels) for each in measured)
    if not (known and call.value.shape[dim] == len(channels) and (held or same)):
        return follower.stop(call, f"a functional grouped convolution{where(call.node)}")
    if slots or held:
        follower.see(call, Member(home, "channels", slots, dict.fromkeys(held, 1), channels, axis=dim), at)
    return follower.pass_through(call, [], dim, None, f"{call.operation} filters each channel on its own")


def _functional_channels(follower: Follower, call: Call, tensors: dict[str, str], dim: int) -> Any:
    """Norms and `prelu`, along the one dimension of channels."""
    counts, name = {}, call.name
    if call.operation == "layernorm":
        if not hasattr(follower.module_named(name), "normalized_shape"):
            return follower.stop(call, f"layer_norm carries its size as a number{where(call.node)}")
        counts, role = {"normalized_shape": 1}, f"{name} mixes channels"
    elif call.operation == "batchnorm":
        role = f"{name} is a functional batch norm"
    elif call.argument("weight", 1).numel() == 1:
        follower.roles[call.node] = "scale"
        return call.source
    else:
        role = f"{name} has a slope for each channel"
    return follower.pass_through(call, [(each, 0) for each in tensors.values()], dim, counts, role)
