"""Following neurons through a network's graph: which neuron each entry of each activation comes from.

The graph is run on an example without its data (PyTorch's meta device). Beside every activation travels an integer
tensor of the same shape, the *names* of its neurons. Reshapes, concatenations and other movements are simply executed
on it; a Linear or Conv that reads it learns which neuron owns which of its input columns, and makes new neurons; an
addition or a product ties the neurons that meet in it; an operation that is not understood freezes what it reads, with
a reason. No architecture is known by name.
"""

import copy
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SOLVABLE = (nn.Linear, *CONVOLUTIONS)  # a weight times the input's patches
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LAYERS = (*SOLVABLE, *TRANSPOSED, *CHANNEL_NORMS, *MIXING_NORMS, nn.PReLU)

# Operations by name, lower case without underscores: module classes, functions and methods spell them alike.
# f(s x) = s f(x) for every s >= 0, entry by entry:
HOMOGENEOUS = {"relu", "leakyrelu", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "featuredropout"}
HOMOGENEOUS |= {"stochasticdepth", "droppath", "dropblock2d", "contiguous", "clone", "detach", "neg", "abs", "float"}
HOMOGENEOUS |= {"to", "typeas", "half", "double", "bfloat16", "rrelu", "alphadropout"}
# entry by entry, but not homogeneous:
ELEMENTWISE = {"relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "sigmoid", "tanh", "hardtanh"}
ELEMENTWISE |= {"hardswish", "hardsigmoid", "logsigmoid", "softsign", "clamp", "clip", "exp", "sqrt", "rsqrt", "pow"}
ELEMENTWISE |= {"square", "threshold", "hardshrink", "softshrink", "tanhshrink", "reciprocal", "maskedfill", "erf"}
# over space, channel by channel, and homogeneous; the digit before the last letter counts the dimensions of space:
POOLS = {f"{kind}pool{d}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg", "lp") for d in (1, 2, 3)}
RESAMPLES = {"interpolate", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d"}
PADS = {"pad", *(f"{kind}pad{d}d" for kind in ("zero", "constant", "reflection", "replication") for d in (1, 2, 3))}
REDUCTIONS = {"mean", "sum", "amax", "amin"}
# entries only change their place:
MOVES = {"flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes", "movedim", "squeeze", "t"}
MOVES |= {"unsqueeze", "getitem", "chunk", "split", "unbind", "narrow", "cat", "concat", "stack", "expand", "roll"}
MOVES |= {"pixelshuffle", "pixelunshuffle", "channelshuffle", "expandas", "flip", "repeat", "select"}
RESHAPES = {"reshape", "view", "unflatten"}
SUMS = {"add", "iadd", "sub", "isub", "rsub"}
QUOTIENTS = {"div", "divide", "truediv", "itruediv"}
PRODUCTS = {"mul", "imul", "multiply", *QUOTIENTS}
# torch.nn.functional's layers: the names of their arguments
FUNCTIONAL = {
    **{f"conv{d}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for d in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "batchnorm": ("input", "running_mean", "running_var", "weight", "bias"),
    "layernorm": ("input", "normalized_shape", "weight", "bias"),
    "prelu": ("input", "weight"),
}

FIXED = -1  # an entry that no removable neuron owns, such as the network's input


@dataclass
class Access:
    """One axis of a layer's tensors, and the neurons along it.

    Attributes:
        layer: the layer's name.
        kind: `rows` (the layer makes the neurons), `columns` (it reads them) or `channels` (they pass through it).
        slots: the tensors that have this axis: `(tensor's name, dimension)`, the weight first.
        counts: the layer's attributes that tell the axis' length, each with the divisor of that length.
        names: `(positions,)`, the neuron at each position.
        node: where it was first seen.
        groups: of a grouped convolution; its columns' dimension is as long as one group.
        axis: the neurons' dimension in the activations that the layer reads.
    """

    layer: str
    kind: str
    slots: list[tuple[str, int]]
    counts: dict[str, int]
    names: Tensor
    node: fx.Node
    groups: int = 1
    axis: int = 1


@dataclass
class Tie:
    """Neurons that can only be removed together, pair by pair; `FIXED` on one side freezes the other."""

    first: Tensor
    second: Tensor
    reason: str
    additive: bool = False


@dataclass
class Quota:
    """Neurons `(n,)` in groups `(n,)` of which equally many must stay."""

    names: Tensor
    groups: Tensor


@dataclass
class Facts:
    """All that was seen while following, over one graph or several of the same network."""

    blocks: dict[str, Tensor] = field(default_factory=dict)  # layer -> the names of the neurons it makes
    parameters: set[str] = field(default_factory=set)  # blocks that are a bare parameter
    bare: set[str] = field(default_factory=set)  # tensors read outside any layer, as a weight that is transposed
    accesses: dict[tuple[str, str], Access] = field(default_factory=dict)  # by layer and kind
    axes: dict[tuple, Tensor] = field(default_factory=dict)  # tensor and dimension -> the neurons along it
    ties: list[Tie] = field(default_factory=list)
    quotas: list[Quota] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # what layers with a forward of their own read
    total: int = 0

    def copy(self) -> "Facts":
        """The same facts, to be added to on their own."""
        return Facts(**{entry.name: copy.copy(getattr(self, entry.name)) for entry in fields(self)})


class Tracer(fx.Tracer):
    """Keeps subclasses of the known layers whole, whatever their forward does, and remembers the user's lines."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows its line; fx's own `record_stack_traces` does the same, and takes longer than tracing."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame and ("/torch/" in frame.f_code.co_filename.replace(chr(92), "/") or frame.f_globals is globals()):
            frame = frame.f_back
        if frame:
            node.meta["line"] = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        return node

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Layers are not looked into."""
        return isinstance(module, LAYERS) or super().is_leaf_module(module, qualified_name)


class Follower(fx.Interpreter):
    """Runs a graph, and with each value the tensor of the neurons that its entries come from.

    Args:
        root: the network.
        facts: what was seen before, to be added to.
        given: the names of the neurons that a layer makes, where they are known; new ones elsewhere.

    Attributes:
        origins: the names that each node's value carries.
        root: the network.
        roles: what each node does to a neuron: `produce`, `norm`, `move`, `scale`, or an obstacle's sentence.
    """

    def __init__(self, root: nn.Module, facts: Facts, given: dict[str, Tensor] | None = None):
        super().__init__(root, graph=Tracer().trace(root))
        self.root = root
        self.facts, self.given = facts, given or {}
        self.origins: dict[fx.Node, Any] = {}
        self.roles: dict[fx.Node, str] = {}
        self.tensor_names: dict[int, str] = {}  # shared tensors go by their first name
        for source in (root.named_parameters, root.named_buffers):
            for name, tensor in source(remove_duplicate=False):
                self.tensor_names.setdefault(id(tensor), name)

    # -- following one node

    def run_node(self, node: fx.Node) -> Any:
        """Run it twice: on the values, and on the names."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        value = super().run_node(node)
        origins = fx.map_arg((node.args, node.kwargs), lambda argument: self.origins[argument])
        self.origins[node] = self._follow(node, args, kwargs, origins, value)
        if _in_place(node, self.fetch_attr(node.target) if node.op == "call_module" else None):
            changed = node.args[0] if node.args else None
            if isinstance(changed, fx.Node) and len(changed.users) > 1 and self.roles.get(node) != "move":
                self.roles[changed] = f"changed in place by {operation_name(node, None)}"
        return value

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        """A normalisation or an activation leaves shapes as they are: without data there is nothing to compute."""
        layer = self.fetch_attr(target)
        name = type(layer).__name__.lower()  # fx looks into all modules but torch's
        keeps_shape = isinstance(layer, (*CHANNEL_NORMS, *MIXING_NORMS)) or name in HOMOGENEOUS | ELEMENTWISE
        if keeps_shape and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return super().call_module(target, args, kwargs)

    def _follow(self, node: fx.Node, args: tuple, kwargs: dict, origins: tuple, value: Any) -> Any:
        sources = [origin for origin in pytree.tree_leaves(origins) if isinstance(origin, Tensor)]
        if node.op == "output":
            for source in sources:
                self._freeze(source, "its neurons are the network's outputs")
            return None
        results = [result for result in pytree.tree_leaves(value) if isinstance(result, Tensor)]
        if node.op == "get_attr" and isinstance(value, Tensor):
            return self._parameter(node, value)
        if node.op in ("placeholder", "get_attr") or not sources or not results:
            return pytree.tree_map(_fixed, value)

        layer = self.fetch_attr(node.target) if node.op == "call_module" else None
        operation = operation_name(node, layer)
        reads_weights = isinstance(layer, LAYERS) or operation in FUNCTIONAL
        if not reads_weights and all(bool((compact(source) == FIXED).all()) for source in sources):
            return pytree.tree_map(_fixed, value)
        if isinstance(node.target, type) and issubclass(node.target, tuple):
            return node.target(*origins[0], **origins[1])
        if isinstance(layer, nn.MultiheadAttention):
            return self._attention(node, layer, origins, value)
        if isinstance(layer, LAYERS):
            if not type(layer).__module__.startswith("torch.nn."):
                self.facts.shapes[node.target] = args[0].shape
            return self._layer(node, layer, sources[0], value)
        home = getattr(node.target, "__module__", None) if node.op == "call_function" else None
        if home and not home.startswith(("torch", "_operator", "operator", "builtins")):
            operation = f"{home}.{operation}"  # a function of the user's is not torch's, whatever its name
        if operation in FUNCTIONAL and node.op == "call_function":
            return self._functional(node, operation, args, kwargs, value)
        if operation in MOVES:
            return self._move(node, operation, layer, origins)
        if operation in HOMOGENEOUS | ELEMENTWISE:
            scales = operation in HOMOGENEOUS
            self.roles[node] = "scale" if scales else f"{operation} is not positively homogeneous"
            return sources[0] if isinstance(value, Tensor) else pytree.tree_map(_fixed, value)
        if operation in POOLS | RESAMPLES | PADS:
            followed = self._over_space(node, operation, args, kwargs, sources[0], value)
            if followed is not None:
                return followed
        if operation in REDUCTIONS and isinstance(value, Tensor):
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = [dims] if isinstance(dims, int) else dims or range(sources[0].ndim)
            if all(constant(sources[0], dim) for dim in dims):
                self.roles[node] = "scale"
                keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
                shrunk = shrink(sources[0], dims)
                return (shrunk if keepdim else shrunk.reshape(value.shape)).expand_as(value)
        if operation in ("softmax", "logsoftmax"):
            dim = getattr(layer, "dim", kwargs.get("dim", args[1] if len(args) > 1 else None))
            if dim is not None and constant(sources[0], dim):
                self.roles[node] = f"{operation} is not positively homogeneous"
                return sources[0]
        if operation in SUMS | PRODUCTS and isinstance(value, Tensor):
            return self._combine(node, operation, args, sources, value)
        if operation in ("matmul", "bmm") and len(sources) == 2 and min(source.ndim for source in sources) >= 2:
            self.roles[node] = "multiplied by other neurons"
            return self._matmul(sources[0], sources[1])
        if operation == "einsum" and len(sources) == 2 and isinstance(args[0], str):
            followed = self._einsum(args[0], *sources)
            if followed is not None:
                self.roles[node] = "multiplied by other neurons"
                return followed
        if operation == "scaleddotproductattention" and len(sources) >= 3:
            self.roles[node] = "attention is not positively homogeneous"
            return self._matmul(self._matmul(sources[0], sources[1].transpose(-1, -2)), sources[2])

        for source in sources:
            self._freeze(source, f"read by {operation}, which is not followed{where(node)}")
        return pytree.tree_map(_fixed, value)

    # -- layers

    def _parameter(self, node: fx.Node, value: Tensor) -> Tensor:
        """A bare parameter with one long dimension: its entries are neurons that others may be tied to."""
        long = [dim for dim, size in enumerate(value.shape) if size > 1]
        used_as_layer = all(operation_name(user, None) in FUNCTIONAL for user in node.users)
        if len(long) != 1 or used_as_layer or not value.is_floating_point():
            if not used_as_layer:
                self.facts.bare.add(self.tensor_names.get(id(value), node.target))
            return _fixed(value)
        name = self.tensor_names.get(id(value), node.target)
        self.facts.parameters.add(name)
        return self._produce(node, name, [(name, long[0])], {}, value, long[0])

    def _layer(self, node: fx.Node, layer: nn.Module, source: Tensor, value: Tensor) -> Tensor:
        """A module that holds weights."""
        name = node.target

        def slots(dim: int, *tensors: str) -> list[tuple[str, int]]:
            """The tensors that exist: the first has the axis at `dim`, the others at 0."""
            found = []
            for position, attribute in enumerate(tensors):
                tensor = getattr(layer, attribute, None)
                if tensor is not None:
                    own = self.tensor_names.get(id(tensor), f"{name}.{attribute}")
                    found.append((own, 0 if position else dim))
            return found

        if isinstance(layer, nn.Linear):
            dim = value.ndim - 1
            self._read(node, name, slots(1, "weight"), {"in_features": 1}, source, dim)
            return self._produce(node, name, slots(0, "weight", "bias"), {"out_features": 1}, value, dim)
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
            transposed = isinstance(layer, TRANSPOSED)
            dim = value.ndim - layer.weight.ndim + 1
            narrowed = slots(0, "weight")[0][0] in self.given  # down to one channel a group
            if layer.groups == layer.in_channels and layer.groups > 1 and not narrowed:
                repeats = layer.out_channels // layer.in_channels
                if transposed and repeats > 1:
                    return self._stop(node, source, value, "a grouped transposed convolution reads it")
                tensors = slots(0, "weight", "bias")
                counts = {"out_channels": 1, "in_channels": repeats, "groups": repeats}
                self.roles[node] = f"{name} filters each channel on its own"
                return self._pass(node, name, tensors, counts, source, dim, value, repeats)
            if layer.groups > 1 and transposed:
                return self._stop(node, source, value, "a grouped transposed convolution reads it")
            rows, columns = (1, 0) if transposed else (0, 1)
            self._read(node, name, slots(columns, "weight"), {"in_channels": 1}, source, dim, layer.groups)
            return self._produce(
                node, name, slots(rows, "weight", "bias"), {"out_channels": 1}, value, dim, layer.groups
            )
        if isinstance(layer, nn.PReLU):
            if layer.num_parameters == 1:
                self.roles[node] = "scale"
                return source
            self.roles[node] = f"{name} has a slope for each channel"
            return self._pass(node, name, slots(0, "weight"), {"num_parameters": 1}, source, 1, value)

        tensors = slots(0, "weight", "bias", "running_mean", "running_var")
        if isinstance(layer, CHANNEL_NORMS):
            if isinstance(layer, BATCH_NORMS):
                self.roles[node] = "norm"
            else:
                self.roles[node] = f"{name} normalises each image"
            return self._pass(node, name, tensors, {"num_features": 1}, source, 1, value)
        if isinstance(layer, nn.GroupNorm):
            self.roles[node] = f"{name} mixes channels"
            if layer.num_groups == layer.num_channels:
                counts = {"num_channels": 1, "num_groups": 1}
                return self._pass(node, name, tensors, counts, source, 1, value)
            followed = self._pass(node, name, tensors, {"num_channels": 1}, source, 1, value)
            if layer.num_groups > 1:
                self._quota(along(source, 1), layer.num_groups)
            return followed
        # LayerNorm and RMSNorm: over the last dimension, or over the channels in a subclass that moves them there
        dims = varying(source)
        if len(layer.normalized_shape) == 1 and len(dims) == 1 and value.shape[dims[0]] == layer.normalized_shape[0]:
            self.roles[node] = f"{name} mixes channels"
            return self._pass(node, name, tensors, {"normalized_shape": 1}, source, dims[0], value)
        if not dims:
            return source
        return self._stop(node, source, value, f"{name} normalises over several dimensions")

    def _attention(self, node: fx.Node, layer: nn.MultiheadAttention, origins: tuple, value: Any) -> Any:
        """`nn.MultiheadAttention` ties its inner width to its input's.

        So that both shrink by equally much, each run of `head_dim` input channels is one with the head at its place.
        """
        name, options = node.target, dict(zip(("query", "key", "value"), origins[0], strict=False)) | origins[1]
        inputs = [options[label] for label in ("query", "key", "value")]
        plain = layer.in_proj_weight is not None and layer.bias_k is None
        if not plain or any(varying(source) not in ([], [2]) for source in inputs):
            reason = f"{name}: nn.MultiheadAttention ties its inner width to embed_dim"
            for source in inputs:
                self._freeze(source, reason)
            return pytree.tree_map(_fixed, value)
        slots = {
            label: self.tensor_names.get(id(tensor), f"{name}.{label}") for label, tensor in layer.named_parameters()
        }
        for source in inputs[1:]:
            self._tie(inputs[0], source, f"{name} reads them together")
        reads = along(inputs[0], 2)
        heads = reads.view(layer.num_heads, layer.head_dim)
        self._tie(heads, heads[:, :1].expand_as(heads), f"{name} has whole heads")
        inner = heads[:, :1].expand_as(heads).reshape(-1)
        self._see(Access(name, "columns", [(slots["in_proj_weight"], 1)], {}, reads, node))
        counts = {"embed_dim": 1, "kdim": 1, "vdim": 1, "num_heads": layer.head_dim}
        self._see(Access(name, "channels", [], counts, inner, node))
        stacked = [(slots[label], 0) for label in ("in_proj_weight", "in_proj_bias") if label in slots]
        self._see(Access(f"{name}.in_proj", "channels", stacked, {}, inner.repeat(3), node))
        out = f"{name}.out_proj"
        self._see(Access(out, "columns", [(slots["out_proj.weight"], 1)], {"in_features": 1}, inner, node))
        rows = [(slots[label], 0) for label in ("out_proj.weight", "out_proj.bias") if label in slots]
        return (self._produce(node, out, rows, {"out_features": 1}, value[0], 2), _fixed(value[1]))

    def _functional(self, node: fx.Node, operation: str, args: tuple, kwargs: dict, value: Tensor) -> Tensor:
        """`torch.nn.functional`'s layers on parameters of the user's module."""
        labels = FUNCTIONAL[operation]
        given = dict(zip(labels, args, strict=False)) | kwargs
        nodes = dict(zip(labels, node.args, strict=False)) | dict(node.kwargs)
        source = self.origins[nodes["input"]]
        tensors = {}
        for label in ("weight", "bias", "running_mean", "running_var"):
            argument = nodes.get(label)
            if isinstance(argument, fx.Node):
                if argument.op != "get_attr":
                    return self._stop(node, source, value, f"{operation} with a computed {label}{where(node)}")
                tensors[label] = self.tensor_names.get(id(given[label]), argument.target)
        if operation != "linear" and not tensors:
            self.roles[node] = f"{operation} mixes channels" if operation == "layernorm" else "scale"
            if operation == "batchnorm" or all(constant(source, dim) for dim in varying(source)):
                return source
            return self._stop(node, source, value, f"{operation} without parameters{where(node)}")
        weight = given.get("weight")
        name = tensors["weight"].removesuffix(".weight") if "weight" in tensors else node.name
        rows = [(tensors[label], 0) for label in ("weight", "bias", "running_mean", "running_var") if label in tensors]
        if operation == "linear" or operation.startswith("conv"):
            if operation != "linear" and given.get("groups", 1) > 1:
                return self._stop(node, source, value, f"a functional grouped convolution{where(node)}")
            dim = value.ndim - 1 if operation == "linear" else value.ndim - weight.ndim + 1
            self._read(node, name, [(tensors["weight"], 1)], {}, source, dim)
            return self._produce(node, name, rows, {}, value, dim)
        dim = varying(source)
        if len(dim) > 1:
            return self._stop(node, source, value, f"{operation} over several dimensions{where(node)}")
        if not dim:
            return source
        counts = {}
        if operation == "layernorm":
            owner = self._module(name)
            if not hasattr(owner, "normalized_shape"):
                return self._stop(node, source, value, f"layer_norm carries its size as a number{where(node)}")
            counts = {"normalized_shape": 1}
            self.roles[node] = f"{name} mixes channels"
        elif operation == "batchnorm":
            self.roles[node] = f"{name} is a functional batch norm"
        else:
            self.roles[node] = f"{name} has a slope for each channel"
            if weight.numel() == 1:
                self.roles[node] = "scale"
                return source
        return self._pass(node, name, rows, counts, source, dim[0], value)

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.root.get_submodule(name)
        except AttributeError:
            return None

    def _produce(
        self,
        node: fx.Node,
        name: str,
        slots: list[tuple[str, int]],
        counts: dict[str, int],
        value: Tensor,
        dim: int,
        groups: int = 1,
    ) -> Tensor:
        """New neurons along `dim`, the same ones whenever the layer is called again."""
        self.roles[node] = "produce"
        width = value.shape[dim]
        key = slots[0][0]  # layers that share a weight share its neurons
        if key not in self.facts.blocks:
            names = self.given.get(key)
            if names is None:
                names = torch.arange(self.facts.total, self.facts.total + width)
            self.facts.blocks[key] = names
            self.facts.total = max(self.facts.total, int(names.max()) + 1)
        names = self.facts.blocks[key]
        if len(names) != width:
            raise ValueError(f"{name} makes {width} neurons, not {len(names)}")
        self.facts.accesses.setdefault((name, "rows"), Access(name, "rows", slots, counts, names, node))
        if groups > 1:
            self._quota(names, groups)
        return lay_along(names, dim, value.ndim).expand_as(value)

    def _read(
        self,
        node: fx.Node,
        name: str,
        slots: list[tuple[str, int]],
        counts: dict[str, int],
        source: Tensor,
        dim: int,
        groups: int = 1,
    ) -> None:
        """A layer's columns read the neurons along `dim`."""
        names = self._settle(source, dim)
        self._see(Access(name, "columns", slots, counts, names, node, groups))
        if groups > 1:
            self._quota(names, groups)

    def _pass(
        self,
        node: fx.Node,
        name: str,
        slots: list[tuple[str, int]],
        counts: dict[str, int],
        source: Tensor,
        dim: int,
        value: Tensor,
        repeats: int = 1,
    ) -> Tensor:
        """A layer with parameters for each channel along `dim`; each becomes `repeats` channels."""
        names = self._settle(source, dim).repeat_interleave(repeats)
        if slots or counts:
            self._see(Access(name, "channels", slots, counts, names, node, axis=dim))
        return lay_along(names, dim, value.ndim).expand_as(value)

    def _see(self, access: Access) -> None:
        """Note what a layer reads; a layer called again ties what it reads now to what it read before."""
        self.facts.accesses.setdefault((access.layer, access.kind), access)
        for axis in access.slots or [(access.layer, access.kind)]:
            before = self.facts.axes.setdefault(axis, access.names)
            if not torch.equal(before, access.names):
                if len(before) != len(access.names):
                    raise ValueError(f"{access.layer} reads {len(access.names)} neurons, not {len(before)}")
                reason = f"{access.layer} or its weight is used several times"
                self._tie(before, access.names, reason, additive=True)

    def _settle(self, source: Tensor, dim: int) -> Tensor:
        """The neuron of each position along `dim`; several that share a position are tied."""
        names = along(source, dim)
        if not all(constant(source, other) for other in range(source.ndim) if other != dim % source.ndim):
            self._tie(lay_along(names, dim, source.ndim), source, "several of its neurons are read through one weight")
        return names

    # -- operations without weights

    def _move(self, node: fx.Node, operation: str, layer: nn.Module | None, origins: tuple) -> Any:
        """The operation itself, on the names; what it says about sizes becomes constraints."""
        self.roles[node] = "move"
        moved, options = origins
        if operation in ("cat", "concat"):
            result = self._concatenate(moved[0], options.get("dim", moved[1] if len(moved) > 1 else 0))
        elif node.op == "call_module":
            result = layer(*moved, **options)
        elif node.op == "call_method":
            method = "reshape" if operation == "view" else node.target  # names need not lie like values in memory
            result = getattr(moved[0], method)(*moved[1:], **options)
        else:
            result = node.target(*moved, **options)
        result = pytree.tree_map_only(Tensor, canonical, result)
        if operation in RESHAPES:
            self._constrain_reshape(node, operation, layer, result)
        elif operation in ("chunk", "split") and isinstance(moved[0], Tensor):
            dim = options.get("dim", moved[2] if len(moved) > 2 else 0)
            if not constant(moved[0], dim):
                sizes = [part.shape[dim] for part in result]
                if operation == "split" and not all(isinstance(a, fx.Node) for a in pytree.tree_leaves(node.args[1:2])):
                    self._freeze(moved[0], f"split by sizes given as numbers{where(node)}")
                elif len(set(sizes)) > 1:
                    self._freeze(moved[0], f"split into unequal parts{where(node)}")
                else:
                    self._quota(self._settle(moved[0], dim), len(sizes))
        return result

    def _concatenate(self, parts: list[Tensor], dim: int) -> Tensor:
        """`torch.cat`, without writing out the repetitions that all parts share.

        Along a dimension where no part changes its neurons (tokens, space), the parts are the same neurons.
        """
        dim %= parts[0].ndim
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        dims = varying(parts[0])
        if dims and dim not in dims and all(varying(part) == dims for part in parts):
            for part in parts[1:]:
                self._tie(shrink(parts[0], [dim]), shrink(part, [dim]), "put side by side", additive=True)
            return shrink(parts[0], [dim]).expand(shape)
        shared = [d for d in range(len(shape)) if d != dim and all(part.stride(d) == 0 for part in parts)]
        return torch.cat([shrink(part, shared) for part in parts], dim).expand(shape)

    def _constrain_reshape(self, node: fx.Node, operation: str, layer: nn.Module | None, result: Tensor) -> None:
        """A dimension whose size is a number in the user's code keeps its size."""
        if layer is not None:
            sizes, offset = list(layer.unflattened_size), layer.dim % (result.ndim - len(layer.unflattened_size) + 1)
        else:
            sizes = list(node.args[1:]) if operation != "unflatten" else list(node.args[2])
            sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
            offset = 0 if operation != "unflatten" else node.args[1] % (result.ndim - len(sizes) + 1)
        if len(sizes) + offset > result.ndim or not sizes or isinstance(sizes[0], torch.Size):
            return
        told = {offset + i for i, size in enumerate(sizes) if isinstance(size, int) and size != -1}
        dims = varying(result)
        free = [dim for dim in dims if dim not in told]
        for dim in free:
            measured = self._measured(sizes[dim - offset]) if 0 <= dim - offset < len(sizes) else None
            if measured is not None and len(measured) == result.shape[dim]:
                names = self._settle(result, dim)
                if torch.equal(names.sort().values, measured.sort().values):
                    continue  # the same neurons in another order
                self._tie(names, measured, f"as many as other neurons{where(node)}", additive=True)
        held = [dim for dim in dims if dim in told]
        if not held:
            return
        if not free:
            owner, choices = self._attributes(node, result, held)
            heads = [dim for dim, names in choices.items() if any("head" in n and "dim" not in n for n in names)]
            if choices:
                dim = heads[-1] if heads else next(iter(choices))  # (3, heads, ...): a literal 3 comes first
                kind = f"channels of {owner}: {', '.join(choices[dim])} at {node.name}"
                counts = dict.fromkeys(choices[dim], 1)
                self._see(Access(owner, kind, [], counts, along(result, dim), node))
                free = [dim]
                held.remove(dim)
        if not free or any(free[0] < dim < free[-1] for dim in held):
            listed = ", ".join("?" if isinstance(size, fx.Node) else str(size) for size in sizes)
            self._freeze(result, f"reshaped to ({listed}), which carries a channel count as a number{where(node)}")
            return
        for dim in held:  # before the free ones: the same stay at each index; behind them: whole blocks stay or go
            self._tie(result, result.narrow(dim, 0, 1).expand_as(result), f"reshaped in blocks{where(node)}")

    def _measured(self, size: Any) -> Tensor | None:
        """The neurons `(n,)` along the dimension whose length a size in the graph is; None if it is no such length."""
        if not isinstance(size, fx.Node):
            return None
        if size.op == "call_function" and size.target is operator.getitem and isinstance(size.args[1], int):
            shape, dim = size.args
        elif size.op == "call_method" and size.target == "size" and len(size.args) == 2:
            shape, dim = size, size.args[1]
        else:
            return None
        source = shape.args[0] if isinstance(shape, fx.Node) and shape.args else None
        origin = self.origins.get(source)
        reads = isinstance(shape, fx.Node) and (shape.target in (getattr, "size"))
        if not reads or not isinstance(origin, Tensor) or not isinstance(dim, int) or constant(origin, dim):
            return None
        return self._settle(origin, dim)

    def _attributes(self, node: fx.Node, result: Tensor, dims: list[int]) -> tuple[str, dict[int, list[str]]]:
        """The module whose code this is, and its attributes that hold a dimension's size and can shrink with it."""
        owner = next(reversed(node.meta.get("nn_module_stack") or {"": None})).partition("@")[0]
        module = self._module(owner)
        numbers = {name: held for name, held in vars(module).items() if type(held) is int} if module else {}
        found = {dim: [name for name, held in numbers.items() if held == result.shape[dim]] for dim in dims}
        return owner, {dim: names for dim, names in found.items() if names}

    def _over_space(
        self, node: fx.Node, operation: str, args: tuple, kwargs: dict, source: Tensor, value: Any
    ) -> Tensor | None:
        """Pooling, resampling and padding leave each channel where it is, if its entries are all of one neuron."""
        if not isinstance(value, Tensor) or value.ndim != source.ndim:
            return None
        if operation in POOLS:
            space = range(value.ndim - int(operation[-2]), value.ndim)
        elif operation == "pad":
            amounts = kwargs.get("pad", args[1] if len(args) > 1 else ())
            space = [value.ndim - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
        else:
            space = [dim for dim in range(value.ndim) if source.shape[dim] != value.shape[dim]]
        if operation == "pad" and not all(constant(source, dim) for dim in space):
            if kwargs.get("mode", "constant") != "constant" or not all(isinstance(a, int) for a in amounts):
                return None
            self.roles[node] = "move"
            return F.pad(source, list(amounts), value=FIXED)
        if not all(constant(source, dim) for dim in space):
            return None
        given = kwargs.get("value", args[3] if len(args) > 3 else 0) if operation == "pad" else 0
        if node.op == "call_module":
            given = getattr(self.fetch_attr(node.target), "value", 0)
        self.roles[node] = "padded with a constant" if operation in PADS and given else "scale"
        return shrink(source, space).expand_as(value)

    def _combine(self, node: fx.Node, operation: str, args: tuple, sources: list[Tensor], value: Tensor) -> Tensor:
        """A sum or product of two values: neurons that meet in one entry are tied."""
        additive = operation in SUMS
        if len(sources) < 2:
            self.roles[node] = "a constant is added" if additive else "scale"
            if operation in QUOTIENTS and not isinstance(args[0], Tensor):
                self.roles[node] = "it divides a constant"
            return sources[0].expand_as(value)
        first, second = (source.expand_as(value) for source in sources[:2])
        if all((source == FIXED).all() for source in (compact(first), compact(second))):
            return first
        dims = set(varying(first)) | set(varying(second))
        for this, that in ((0, 1), (1, 0)):
            # what is broadcast along the neurons, as a mask over space is, asks nothing of them
            padded = (1,) * (value.ndim - sources[that].ndim) + tuple(sources[that].shape)
            own = varying(sources[this].expand_as(value))
            if own and all(padded[dim] == 1 for dim in own) and not varying(sources[that].expand_as(value)):
                self.roles[node] = "a constant is added" if additive else "scale"
                if this == 1 and operation in QUOTIENTS:
                    self.roles[node] = "it divides a constant"
                only = compact(second if that else first)
                if bool((only != FIXED).any()):
                    self.roles[node] = "added to other neurons" if additive else "multiplied by other neurons"
                return (first, second)[this]
        for that in (0, 1):
            argument = node.args[that] if len(node.args) > that else None
            bare = isinstance(argument, fx.Node) and argument.op == "get_attr" and len(dims) == 1
            if bare and not varying(sources[that]):
                bound = self._bind(argument, sources[that], next(iter(dims)), value)
                if bound is not None:
                    first, second = (first, bound) if that else (bound, second)
        if torch.equal(compact(first).expand_as(value), compact(second).expand_as(value)):
            self.roles[node] = "scale" if additive else "multiplied by itself"
            return first
        parameter = any(self._is_parameter(source) for source in (first, second))
        other = "a parameter" if parameter else "other neurons"
        self.roles[node] = f"{'added to' if additive else 'multiplied by'} {other}"
        self._tie(first, second, self.roles[node], additive=additive and not parameter)
        return torch.maximum(compact(first), compact(second)).expand_as(value)

    def _bind(self, argument: fx.Node, source: Tensor, dim: int, value: Tensor) -> Tensor | None:
        """A parameter with several long dimensions, where its neighbour tells which one is the channels'."""
        own = dim - (value.ndim - source.ndim)
        tensor = self.env.get(argument)
        if own < 0 or source.shape[own] != value.shape[dim] or not isinstance(tensor, Tensor):
            return None
        name = self.tensor_names.get(id(tensor), argument.target)
        self.facts.parameters.add(name)
        role = self.roles.get(argument, "")
        names = self._produce(argument, name, [(name, own)], {}, source, own)
        self.roles[argument] = role
        return names.expand_as(value)

    def _is_parameter(self, names: Tensor) -> bool:
        first = int(compact(names).reshape(-1)[0])
        return any(first in self.facts.blocks[name] for name in self.facts.parameters if name in self.facts.blocks)

    def _matmul(self, first: Tensor, second: Tensor) -> Tensor:
        """`(..., a, b) @ (..., b, c)`."""
        return self._contract(first.unsqueeze(-1), second.unsqueeze(-3), [-2]).squeeze(-2)

    def _einsum(self, equation: str, first: Tensor, second: Tensor) -> Tensor | None:
        """`torch.einsum` of two operands, without repeated letters or dots."""
        inputs, arrow, result = equation.replace(" ", "").partition("->")
        letters = inputs.split(",")
        if not arrow or len(letters) != 2 or "." in inputs or any(len(set(word)) < len(word) for word in letters):
            return None
        summed = [letter for letter in dict.fromkeys(inputs) if letter not in result and letter != ","]
        order = [*result, *summed]

        def spread(names: Tensor, word: str) -> Tensor:
            names = names.permute([word.index(letter) for letter in order if letter in word])
            for dim, letter in enumerate(order):
                names = names if letter in word else names.unsqueeze(dim)
            return names

        dims = list(range(len(result), len(order)))
        contracted = self._contract(spread(first, letters[0]), spread(second, letters[1]), dims)
        return contracted.flatten(len(result)).squeeze(-1) if dims else contracted

    def _contract(self, left: Tensor, right: Tensor, dims: list[int]) -> Tensor:
        """A product summed over `dims`: what is summed stays or goes as one, with what it is multiplied by."""
        left, right = torch.broadcast_tensors(left, right)
        for factor in (left, right):
            self._tie(factor, shrink(factor, dims), "summed over in a matrix product")
        left, right = shrink(left, dims), shrink(right, dims)
        if bool((compact(left) == FIXED).all()):
            return right
        if not bool((compact(right) == FIXED).all()):
            self._tie(left, right, "multiplied in a matrix product")
        return left

    def _stop(self, node: fx.Node, source: Tensor, value: Any, reason: str) -> Any:
        self._freeze(source, reason)
        return pytree.tree_map(_fixed, value)

    # -- what is noted

    def _freeze(self, source: Tensor, reason: str) -> None:
        self.facts.frozen.append((compact(source).unique(), reason))

    def _tie(self, first: Tensor, second: Tensor, reason: str, additive: bool = False) -> None:
        first, second = torch.broadcast_tensors(first, second)
        dims = [d for d in range(first.ndim) if first.stride(d) == 0 and second.stride(d) == 0 and first.shape[d] > 1]
        first, second = shrink(first, dims), shrink(second, dims)
        first, second = first.reshape(-1), second.reshape(-1)
        apart = first != second
        base = self.facts.total + 1
        pairs = ((first[apart] + 1) * base + second[apart] + 1).unique()
        if len(pairs):
            self.facts.ties.append(Tie(pairs // base - 1, pairs % base - 1, reason, additive))

    def _quota(self, names: Tensor, groups: int) -> None:
        """Equally many of each of `groups` consecutive runs must stay."""
        self.facts.quotas.append(Quota(names, torch.arange(groups).repeat_interleave(len(names) // groups)))


# -- small facts about a tensor of names


def operation_name(node: fx.Node, layer: nn.Module | None) -> str:
    """What a node does, lower case without underscores."""
    if layer is not None:
        name = type(layer).__name__
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.replace("_", "").lower()


def _in_place(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether an operation writes into its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return writes or bool(getattr(layer, "inplace", False) is True or node.kwargs.get("inplace", False))


def where(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, in brackets; empty where it is unknown."""
    return f" ({node.meta['line']})" if "line" in node.meta else ""


def _fixed(value: Any) -> Any:
    return torch.full((), FIXED).expand(value.shape) if isinstance(value, Tensor) else value


def shrink(names: Tensor, dims: Iterable[int]) -> Tensor:
    """The first entry along each of `dims`, which stay with size 1."""
    for dim in dims:
        names = names.narrow(dim, 0, min(1, names.shape[dim]))
    return names


def compact(names: Tensor) -> Tensor:
    """Without the repetitions that `expand` made."""
    return shrink(names, [dim for dim in range(names.ndim) if names.stride(dim) == 0 and names.shape[dim] > 1])


def canonical(names: Tensor) -> Tensor:
    """The same names in as little memory as they need: one entry along each dimension where nothing changes."""
    dims = [dim for dim in range(names.ndim) if names.shape[dim] > 1 and constant(names, dim)]
    return shrink(names, dims).clone().expand_as(names)


def constant(names: Tensor, dim: int) -> bool:
    """Whether nothing changes along `dim`."""
    names = compact(names)
    return names.shape[dim] < 2 or bool((names == names.narrow(dim, 0, 1)).all())


def varying(names: Tensor) -> list[int]:
    """The dimensions along which the neuron changes."""
    return [dim for dim in range(names.ndim) if not constant(names, dim)]


def lay_along(names: Tensor, dim: int, ndim: int) -> Tensor:
    """Names `(n,)` as a tensor of `ndim` dimensions, all of size 1 but `dim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return names.view(shape)


def along(names: Tensor, dim: int) -> Tensor:
    """The neuron of each position along `dim`: `(n,)`."""
    dim %= names.ndim
    return shrink(names, [other for other in range(names.ndim) if other != dim]).reshape(-1)
