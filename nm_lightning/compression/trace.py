"""First room: find the sites, the sets of hidden neurons that can shrink together.

The network is run once, symbolically traced, on an example input. Beside every activation travels an integer
tensor of the same shape that names the neuron each entry comes from. Reshapes, concatenations and other
movements are simply executed on it; a Linear or Conv that reads it learns which neuron owns which of its
input columns; an addition ties two neurons together; an operation that is not understood freezes what it
reads, with a reason. No architecture is known by name.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nm_lightning.errors import InputError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *BATCH_NORMS)

# Operations by name, lower case without underscores: module classes, functions and methods spell them alike.
# f(s x) = s f(x) for every s >= 0, channel by channel:
HOMOGENEOUS = {"relu", "leakyrelu", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "stochasticdepth"}
HOMOGENEOUS |= {"contiguous", "clone", "detach", "neg"}
# entry by entry, but not homogeneous:
ELEMENTWISE = {"relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "sigmoid", "tanh", "hardtanh"}
ELEMENTWISE |= {"hardswish", "hardsigmoid", "logsigmoid", "softsign", "clamp", "abs"}
# over space, channel by channel, and homogeneous:
POOLS = {f"{kind}pool{d}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for d in (1, 2, 3)}
# entries only change their place:
MOVES = {"flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes", "movedim", "squeeze"}
MOVES |= {"unsqueeze", "getitem", "chunk", "split", "unbind", "narrow", "cat", "concat", "stack", "expand", "roll"}
MOVES |= {"pixelshuffle", "pixelunshuffle", "channelshuffle"}
SUMS = {"add", "iadd", "sub", "isub"}
PRODUCTS = {"mul", "imul", "multiply", "div", "truediv", "itruediv"}

FIXED = -1  # an entry that no removable neuron owns, such as the network's input


@dataclass
class Member:
    """A layer's share in a site.

    Attributes:
        name: the layer's name in the network.
        owner: `(n,)`, for each position of the layer's rows, columns or channels the site's neuron that owns it,
            -1 where none does.
    """

    name: str
    owner: Tensor

    def positions(self) -> Tensor:
        """The positions each neuron owns: `(neurons, positions of each)`, in order."""
        neurons = int(self.owner.max()) + 1
        order = torch.argsort(self.owner, stable=True)
        return order[int((self.owner < 0).sum()) :].view(neurons, -1)


@dataclass
class Consumer(Member):
    """A layer that reads the site's neurons.

    Attributes:
        norm: the BatchNorm between the producer and this layer, if there is one.
        obstacle: why a scaled neuron would not arrive here scaled; empty where it does.
    """

    norm: str | None = None
    obstacle: str = ""


@dataclass
class Site:
    """Hidden neurons that can shrink together.

    Attributes:
        name: the producer's name.
        width: number of neurons.
        producer: the Linear or Conv whose rows the neurons are.
        passed: per-channel layers on the way, sliced like the producer.
        consumers: the layers that read the neurons.
    """

    name: str
    width: int
    producer: Member
    passed: list[Member]
    consumers: list[Consumer]


@dataclass
class Trace:
    """What `trace` found: the sites in the order of execution, and each other layer with the reason it stays."""

    sites: list[Site]
    skipped: dict[str, str]


def trace(model: nn.Module, example_input: Tensor) -> Trace:
    """Find every site of a network.

    Args:
        model: any network that `torch.fx` can trace; its weights are only read. It should be in eval mode.
        example_input: a batch that `model` accepts.

    Returns:
        The sites, and the layers that can't be compressed with the reason why.

    Raises:
        InputError: the network can't be traced, or does not accept the example.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(site.name, site.width, [c.name for c in site.consumers]) for site in trace(net, torch.zeros(1, 4)).sites]
    [('0', 8, ['2'])]
    """
    try:
        graph_module = fx.GraphModule(model, _Tracer().trace(model))
    except Exception as error:  # fx raises whatever the user's forward raises on symbolic values
        raise InputError(f"{type(model).__name__} can't be traced by torch.fx: {_first_line(error)}") from error
    with torch.no_grad():
        try:
            model(example_input)
        except Exception as error:  # whatever the user's forward raises
            shape = tuple(example_input.shape)
            raise InputError(
                f"{type(model).__name__} rejects an input of shape {shape}: {_first_line(error)}"
            ) from error
        follower = _Follower(graph_module)
        follower.run(example_input)
    return follower.collect()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class _Tracer(fx.Tracer):
    """Keeps subclasses of the known layers whole, whatever their forward does."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, LAYERS) or super().is_leaf_module(module, qualified_name)


class _Follower(fx.Interpreter):
    """Runs the graph, and with each value the tensor of the neurons that its entries come from."""

    def __init__(self, graph_module: fx.GraphModule):
        super().__init__(graph_module)
        self.origins: dict[fx.Node, Any] = {}
        self.blocks: dict[str, range] = {}  # producer -> the neurons it makes
        self.reads: dict[str, tuple[fx.Node, Tensor]] = {}  # consumer -> its node, the neuron of each column
        self.passes: dict[str, tuple[fx.Node, Tensor]] = {}  # per-channel layer -> its node, each channel's neuron
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.roles: dict[fx.Node, str] = {}  # node -> "produce", "norm", "move", "scale", or an obstacle's sentence
        self.carried: dict[fx.Node, set[str]] = {}
        self.total = 0

    # -- following one node

    def run_node(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        value = super().run_node(node)
        origins = fx.map_arg((node.args, node.kwargs), lambda argument: self.origins[argument])
        self.origins[node] = self._follow(node, args, kwargs, origins, value)
        return value

    def _follow(self, node: fx.Node, args: tuple, kwargs: dict, origins: tuple, value: Any) -> Any:
        sources = [origin for origin in pytree.tree_leaves(origins) if isinstance(origin, Tensor)]
        if node.op == "output":
            for source in sources:
                self._freeze(source, "its neurons are the network's outputs")
            return None
        results = [result for result in pytree.tree_leaves(value) if isinstance(result, Tensor)]
        if node.op in ("placeholder", "get_attr") or not sources or not results:
            return pytree.tree_map(_fixed, value)

        layer = self.fetch_attr(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Linear):
            return self._layer(node, layer, sources[0], dim=value.ndim - 1, value=value)
        if isinstance(layer, CONVOLUTIONS) and layer.groups == 1:
            return self._layer(node, layer, sources[0], dim=value.ndim - layer.weight.ndim + 1, value=value)
        if isinstance(layer, BATCH_NORMS):
            self._see(self.passes, node, _along(sources[0], 1))
            self.roles[node] = "norm"
            return sources[0]

        operation = _operation(node, layer)
        if operation in MOVES:
            self.roles[node] = "move"
            moved, options = origins
            if node.op == "call_module":
                return layer(*moved, **options)
            if node.op == "call_method":
                method = "reshape" if operation == "view" else node.target  # names need not lie like values in memory
                return getattr(moved[0], method)(*moved[1:], **options)
            return node.target(*moved, **options)
        if operation in HOMOGENEOUS or operation in ELEMENTWISE:
            scales = operation in HOMOGENEOUS
            self.roles[node] = "scale" if scales else f"{operation} is not positively homogeneous"
            return sources[0]
        if operation in POOLS and isinstance(value, Tensor):
            space = range(value.ndim - int(operation[-2]), value.ndim)
            if all(_constant(sources[0], dim) for dim in space):
                self.roles[node] = "scale"
                return _shrink(sources[0], space).expand_as(value)
        if operation == "mean" and isinstance(value, Tensor):
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = [dims] if isinstance(dims, int) else dims or range(sources[0].ndim)
            if all(_constant(sources[0], dim) for dim in dims):
                self.roles[node] = "scale"
                keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
                shrunk = _shrink(sources[0], dims)
                return (shrunk if keepdim else shrunk.reshape(value.shape)).expand_as(value)
        if operation in SUMS | PRODUCTS and isinstance(value, Tensor):
            return self._combine(node, operation, sources, value)

        for source in sources:
            self._freeze(source, f"read by {operation}, which is not followed")
        return pytree.tree_map(_fixed, value)

    def _layer(self, node: fx.Node, layer: nn.Module, source: Tensor, dim: int, value: Tensor) -> Tensor:
        """A Linear or Conv: its input columns are read by it, its output rows are new neurons along `dim`."""
        self.roles[node] = "produce"
        if _constant_elsewhere(source, dim):
            self._see(self.reads, node, _along(source, dim))
        else:
            self._freeze(source, f"{node.target} reads several of its neurons through one weight")
        width = value.shape[dim]
        if node.target not in self.blocks:
            self.blocks[node.target] = range(self.total, self.total + width)
            self.total += width
        block = self.blocks[node.target]
        shape = [1] * value.ndim
        shape[dim] = width
        return torch.arange(block.start, block.stop).view(shape).expand_as(value)

    def _see(self, seen: dict[str, tuple[fx.Node, Tensor]], node: fx.Node, names: Tensor) -> None:
        """Note what a layer reads; a layer called again ties what it reads now to what it read before."""
        _, before = seen.setdefault(node.target, (node, names))
        if not torch.equal(before, names):
            self.ties.append((before, names))

    def _combine(self, node: fx.Node, operation: str, sources: list[Tensor], value: Tensor) -> Tensor:
        """A sum or product of two values: neurons that meet in one entry are tied."""
        wide = [source for source in sources if source.numel() > 1]
        if len(wide) < 2:
            self.roles[node] = "a constant is added" if operation in SUMS else "scale"
            return torch.maximum(*sources) if len(sources) == 2 else sources[0]
        first, second = (source.expand_as(value) for source in wide)
        if torch.equal(first, second):
            self.roles[node] = "scale" if operation in SUMS else "multiplied by itself"
        else:
            self.roles[node] = "added to other neurons" if operation in SUMS else "multiplied by other neurons"
            self.ties.append((first, second))
        return torch.maximum(first, second)

    def _freeze(self, source: Tensor, reason: str) -> None:
        self.frozen.append((_names(source), reason))

    # -- collecting the sites

    def collect(self) -> Trace:
        """Turn what was seen into sites: a producer whose neurons are tied to no others and frozen by nothing."""
        reasons = self._reasons()
        members = defaultdict(list)
        for kind, seen in (("passed", self.passes), ("consumers", self.reads)):
            for node, names in seen.values():
                for producer in self._producers(names):
                    members[producer, kind].append((node, names))

        sites, skipped = [], {}
        for name, block in self.blocks.items():
            passed, consumers = members[name, "passed"], members[name, "consumers"]

            def owner(names: Tensor, block: range = block) -> Tensor:
                inside = (names >= block.start) & (names < block.stop)
                return torch.where(inside, names - block.start, -1)

            reason = reasons.get(name, "")
            if not consumers:
                reason = reason or "no layer reads its neurons"
            elif not all(_even(owner(names), len(block)) for _, names in passed + consumers):
                reason = reason or "some of its neurons are read more often than others"
            if reason:
                skipped[name] = reason
                continue

            sites.append(
                Site(
                    name=name,
                    width=len(block),
                    producer=Member(name, torch.arange(len(block))),
                    passed=[Member(node.target, owner(names)) for node, names in passed],
                    consumers=[
                        Consumer(node.target, owner(names), *self._path(node, name)) for node, names in consumers
                    ],
                )
            )
        for node in self.module.graph.nodes:
            if node.op == "call_module" and node.target not in self.blocks:
                layer = self.fetch_attr(node.target)
                if isinstance(layer, CONVOLUTIONS):
                    skipped[node.target] = "a grouped convolution, which is not followed"
        return Trace(sites, skipped)

    def _reasons(self) -> dict[str, str]:
        """Why producers can't be compressed: what froze them, or what they are added to."""
        reasons: dict[str, str] = {}
        for names, reason in self.frozen:
            for producer in self._producers(names):
                reasons.setdefault(producer, reason)
        producers = list(self.blocks)
        edges = set()
        for first, second in self.ties:
            pairs = torch.stack([first.reshape(-1), second.reshape(-1)]).unique(dim=1)
            left, right = self._indices(pairs).tolist()
            edges |= set(zip(left, right, strict=True))
        for left, right in edges:
            if left < 0 or right < 0:
                for end in (left, right):
                    if end >= 0:
                        reasons.setdefault(producers[end], "added to something that can't shrink")
        edges = {(left, right) for left, right in edges if left >= 0 and right >= 0}
        if edges:
            left, right = np.array(sorted(edges)).T
            count = len(producers)
            graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(count, count))
            _, labels = connected_components(graph, directed=False)
            for end in {end for edge in edges for end in edge}:
                others = [producers[o] for o in np.flatnonzero(labels == labels[end]) if o != end]
                listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                reasons.setdefault(producers[end], f"added to the neurons of {listed}" if others else "added to itself")
        return reasons

    def _indices(self, names: Tensor) -> Tensor:
        """The index of the producer of each neuron, -1 for `FIXED`."""
        ends = torch.tensor([block.stop for block in self.blocks.values()])
        return torch.where(names < 0, -1, torch.bucketize(names.contiguous(), ends, right=True))

    def _producers(self, names: Tensor) -> set[str]:
        """The producers whose neurons are among `names`."""
        producers = list(self.blocks)
        return {producers[index] for index in self._indices(_names(names)).unique().tolist() if index >= 0}

    def _carried(self, node: fx.Node) -> set[str]:
        """The producers whose neurons a node's value carries."""
        if node not in self.carried:
            leaves = [leaf for leaf in pytree.tree_leaves(self.origins[node]) if isinstance(leaf, Tensor)]
            self.carried[node] = set().union(*(self._producers(leaf) for leaf in leaves))
        return self.carried[node]

    def _path(self, consumer: fx.Node, producer: str) -> tuple[str | None, str]:
        """What lies between a producer and a consumer: the norm directly behind the producer, and an obstacle."""
        steps, pending = set(), list(consumer.all_input_nodes)
        while pending:
            node = pending.pop()
            if node not in steps and producer in self._carried(node) and self.roles.get(node) != "produce":
                steps.add(node)
                pending += node.all_input_nodes
        ordered = [node for node in self.module.graph.nodes if node in steps]
        norm = None
        for index, node in enumerate(ordered):
            role = self.roles[node]
            if role == "norm":
                if norm is not None or any(self.roles[before] != "move" for before in ordered[:index]):
                    return None, f"{node.target} normalises behind another layer"
                norm = node.target
            elif role not in ("move", "scale"):
                return norm, role
        return norm, ""


# -- small facts about a tensor of neurons' names


def _operation(node: fx.Node, layer: nn.Module | None) -> str:
    if layer is not None:
        name = type(layer).__name__
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.replace("_", "").lower()


def _fixed(value: Any) -> Any:
    return torch.full((), FIXED).expand(value.shape) if isinstance(value, Tensor) else value


def _shrink(names: Tensor, dims: Iterable[int]) -> Tensor:
    """The first entry along each of `dims`, which stay with size 1."""
    for dim in dims:
        names = names.narrow(dim, 0, 1)
    return names


def _compact(names: Tensor) -> Tensor:
    """Without the repetitions that `expand` made."""
    return _shrink(names, [dim for dim in range(names.ndim) if names.stride(dim) == 0 and names.shape[dim] > 1])


def _names(names: Tensor) -> Tensor:
    return _compact(names).unique()


def _constant(names: Tensor, dim: int) -> bool:
    """Whether nothing changes along `dim`."""
    names = _compact(names)
    return bool((names == names.narrow(dim, 0, 1)).all())


def _constant_elsewhere(names: Tensor, dim: int) -> bool:
    """Whether the neuron is told by the position along `dim` alone."""
    return all(_constant(names, other) for other in range(names.ndim) if other != dim)


def _along(names: Tensor, dim: int) -> Tensor:
    """The neuron of each position along `dim`: `(n,)`."""
    return _shrink(names, [other for other in range(names.ndim) if other != dim]).reshape(-1)


def _even(owner: Tensor, neurons: int) -> bool:
    """Whether every neuron owns equally many positions."""
    counts = torch.bincount(owner[owner >= 0], minlength=neurons)
    return bool((counts == counts[0]).all())
