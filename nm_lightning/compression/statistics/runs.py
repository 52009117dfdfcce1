"""A network run over calibration images node by node, so that two of them can be compared on the way.

The original and its compressed copy share one graph. Both stop at the same layer, batch by batch; what a batch has
computed and still needs is kept for the next stop while memory allows, and is computed again where it does not.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nm_lightning.compression.graph import graph_of, operation_name
from nm_lightning.compression.graph.tracer import leaves_of
from nm_lightning.compression.structure.copies import plain_copy
from nm_lightning.compression.structure.inputs import Inputs, call, clone, first, length, mapped, split, tensors_in
from nm_lightning.compression.structure.operations import facts_of, mixes_channels
from nm_lightning.compression.structure.plan import apply_plan, plan_sites
from nm_lightning.compression.structure.sites import Site

MEMORY = 2 << 30  # bytes of activations that one run keeps between two stops


@torch.no_grad()
def recorded(model: nn.Module, batches: Sequence[Inputs]) -> tuple[fx.Graph, Sequence[Inputs]]:
    """A network's graph, and the batches that it runs: as they are, or two images each.

    On a CPU images come with their channels last in memory, which is faster, where the network takes them so. Two
    images were recorded: code that makes a plain number of how many there are, or loops over them, takes no more.
    """
    graph, few = graph_of(model, batches[0]), first(batches[0], 3)
    wanted = [leaf for leaf in leaves_of(call(model, clone(few))) if isinstance(leaf, Tensor)]

    def same(few: Inputs) -> bool:
        try:
            found = pytree.tree_leaves(fx.Interpreter(model, graph=graph).run(*tensors_in(clone(few))))
            return all(
                a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-3) for a, b in zip(found, wanted, strict=True)
            )
        except Exception:  # whatever an operation raises whose numbers, or places in memory, don't fit
            return False

    if any(map(is_image, tensors_in(few))) and same(mapped(channels_last, few)):
        return graph, [mapped(channels_last, batch) for batch in batches]
    if same(few):
        return graph, batches
    return graph, [pair for batch in batches for pair in split(batch, 2) if length(pair) == length(first(few, 2))]


def is_image(tensor: Tensor) -> bool:
    """Whether a tensor has planes, and is on a CPU."""
    return tensor.ndim == 4 and tensor.device.type == "cpu" and tensor.is_floating_point()


def channels_last(tensor: Tensor) -> Tensor:
    """An image with its channels last in memory; what is none stays as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if is_image(tensor) else tensor


class Held:
    """What a pass over the batches gives, tuples of tensors, kept for the next passes; made again if it's too large.

    Args:
        make: starts a pass.
        memory: bytes to keep.
    """

    def __init__(self, make: Callable[[], Iterator[tuple[Tensor, ...]]], memory: int):
        self.make, self.memory = make, memory
        self.kept: list[tuple[Tensor, ...]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.kept is not None:
            yield from self.kept
            return
        kept, used = [], 0
        for item in self.make():
            used += sum(tensor.numel() * tensor.element_size() for tensor in item)
            kept = [*kept, item] if used <= self.memory else []
            yield item
        self.kept = kept if used <= self.memory else None


class NarrowNorm(nn.Module):
    """A normalisation over some channels only.

    Args:
        layer: the narrow layer.
        axis: the channels' dimension in what it reads.
        stays: `(k,)`, the channels.
    """

    def __init__(self, layer: nn.Module, axis: int, stays: Tensor):
        super().__init__()
        self.layer, self.axis, self.stays = layer, axis, stays

    def __getattr__(self, name: str) -> Any:
        """What code asks a norm for, as its epsilon or its weight's dtype, is the narrow layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, images: Tensor) -> Tensor:
        """The narrow norm's output at its channels, zero at the others."""
        stays = self.stays.to(images.device)
        return torch.zeros_like(images).index_copy(self.axis, stays, self.layer(images.index_select(self.axis, stays)))


Tensors = Mapping[str, Mapping[str, Tensor] | Tensor]
"""By layer, what stands for its parameters; or `(channels,)`, which is added in its place to what it reads."""


class Run(fx.Interpreter):
    """One network on its way through all calibration batches.

    Args:
        model: the network, in evaluation mode.
        graph: its graph, or that of a network of the same architecture.
        batches: the inputs, each as the network is called with.
        memory: bytes of activations to keep between two stops.

    Attributes:
        norms: layers to be replaced by narrower ones.
        swapped: layers that compute with other tensors, see `Tensors`.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, batches: Sequence[Inputs], memory: int = MEMORY):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.batches, self.memory = batches, memory
        self.nodes = list(graph.nodes)
        self.position = {node: position for position, node in enumerate(self.nodes)}
        self.last = {node: max((self.position[user] for user in node.users), default=-1) for node in self.nodes}
        self.kept: dict[int, tuple[int, dict[fx.Node, Any], int]] = {}  # where each batch waits, its values, bytes
        self.norms: dict[str, NarrowNorm] = {}
        self.swapped: Tensors = {}

    def states(self, stop: fx.Node, count: int | None = None) -> Iterator[dict[fx.Node, Any]]:
        """Each batch's values that `stop` or a later node needs; `value` works on the one that was given last.

        Args:
            stop: where the batches stop; never before an earlier stop.
            count: of the first batches, if not all are wanted; the others wait where they are.
        """
        until = self.position[stop]
        for index, batch in enumerate(self.batches[:count]):
            start, env, _ = self.kept.pop(index, (0, {}, 0))
            self.env = env
            if not start:
                env |= self.placed(batch)
            for position in range(start, until):
                node = self.nodes[position]
                if node not in env and self.last[node] >= position:
                    env[node] = self.run_node(node)
                for done in [node, *node.all_input_nodes]:
                    if self.last[done] <= position:
                        env.pop(done, None)
            yield env
            self.env = env
            tensors = [leaf for leaf in pytree.tree_leaves(list(env.values())) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if sum(kept for _, _, kept in self.kept.values()) + size <= self.memory:
                self.kept[index] = until, env, size

    def value(self, node: fx.Node) -> Any:
        """A node's value for the present batch, computed now if it lies ahead."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.value(source)
            self.env[node] = self.run_node(node)
        return self.env[node]

    def values(self, env: Mapping[fx.Node, Any], ends: Sequence[fx.Node], swapped: Tensors) -> list[Tensor]:
        """The nodes' values that follow from others where layers compute with other tensors; `self.env` has all."""
        self.env, self.swapped = dict(env), swapped
        try:
            return [self.value(end) for end in ends]
        finally:
            self.swapped = {}

    def first_values(self) -> dict[fx.Node, Any]:
        """All nodes' values for the first batch."""
        self.env = self.placed(self.batches[0])
        for node in self.nodes[:-1]:
            self.value(node)
        return self.env

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        """The layer, or the narrow norm in its place, or the layer with other parameters."""
        own = self.swapped.get(target)
        if isinstance(own, Tensor):
            return args[0] + per_row(own, args[0][0])
        if own is not None:
            return torch.func.functional_call(self.fetch_attr(target), own, args, kwargs)
        return self.norms[target](*args) if target in self.norms else super().call_module(target, args, kwargs)

    def placed(self, batch: Inputs) -> dict[fx.Node, Tensor]:
        """A copy of each tensor of a batch, at its placeholder."""
        nodes = [node for node in self.nodes if node.op == "placeholder"]
        return dict(zip(nodes, tensors_in(clone(batch)), strict=True))


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    """`(n,)` as `(n, 1, ...)`, with as many dimensions as a tensor has."""
    return vector.view(-1, *[1] * (like.ndim - 1))


def without_in_place(graph: fx.Graph, *models: nn.Module) -> list[nn.Module]:
    """Rewrite a graph, and switch its modules, so that no operation changes another node's value; returns the modules.

    Who reads a value after it was changed reads the change's result instead.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        layer = models[0].get_submodule(node.target) if node.op == "call_module" else None
        writes = bool(getattr(layer, "inplace", False) is True or node.kwargs.get("inplace"))
        twin = facts_of(operation_name(node, None)).twin if node.op == "call_function" else None
        if twin is not None:
            writes, node.target = True, twin
        elif node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__"):
            homes = [torch.Tensor] if node.op == "call_method" else [torch, nn.functional]
            found = next((getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1])), None)
            if found is not None:
                writes, node.target = True, name[:-1] if node.op == "call_method" else found
        if writes:
            if "inplace" in node.kwargs:
                node.kwargs = {**node.kwargs, "inplace": False}
            changed = node.args[0] if node.args else None
            if isinstance(changed, fx.Node):
                changed.replace_all_uses_with(node, lambda user, here=order[node]: order[user] > here)
    switched = [module for model in models for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in switched:
        module.inplace = False
    return switched


def used_again(graph: fx.Graph, model: nn.Module) -> set[str]:
    """The layers that are called several times, or that have a parameter which something else reads, too."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
    for node in graph.nodes:
        if node.op == "get_attr":
            owners[id(functools.reduce(getattr, node.target.split("."), model))] += 1
    shared = {name for name in calls for own in model.get_submodule(name).parameters() if owners[id(own)] > 1}
    return shared | {name for name, count in calls.items() if count > 1}


def channels_that_stay(
    sites: Sequence[Site], keeps: Mapping[str, Tensor], layers: Collection[str]
) -> dict[str, Tensor]:
    """By layer, of those that make or pass neurons, which of its channels stay `(channels,)`; of all its sites."""
    found: dict[str, Tensor] = {}
    for site in sites:
        for member in (*site.producers, *site.passed):
            if member.name in layers:
                found[member.name] = found.get(member.name, True) & member.stays(keeps[site.name])
    return found


def narrow_norms(
    original: nn.Module, sites: Sequence[Site], keeps: Mapping[str, Tensor], narrow: nn.Module | None = None
) -> dict[str, NarrowNorm]:
    """The normalisations that mix channels, as they are over the survivors alone; `narrow` is made where not given."""
    layers = dict(original.named_modules())
    passed = (member for site in sites for member in site.passed)
    axes = {member.name: member.axis for member in passed if mixes_channels(layers.get(member.name))}
    if not axes:
        return {}
    narrow = narrow or apply_plan(plain_copy(original)[0], plan_sites(sites, keeps))
    stays = channels_that_stay(sites, keeps, axes)
    return {
        name: NarrowNorm(narrow.get_submodule(name), axis, stays[name].nonzero().flatten())
        for name, axis in axes.items()
    }
