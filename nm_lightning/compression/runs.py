"""A network run over calibration images node by node, so that two of them can be compared on the way.

The original and its compressed copy share one graph. Both stop at the same layer, batch by batch; what a batch has
computed and still needs is kept for the next stop while memory allows, and is computed again where it does not.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

MEMORY = 2 << 30  # bytes of activations that one run keeps between two stops
NOT_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
NOT_IN_PLACE |= {operator.itruediv: operator.truediv}


@dataclass
class NarrowNorm:
    """A normalisation over some channels only.

    Attributes:
        layer: the narrow layer.
        axis: the channels' dimension in what it reads.
        stays: `(k,)`, the channels.
    """

    layer: nn.Module
    axis: int
    stays: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """The narrow norm's output at its channels, zero at the others."""
        stays = self.stays.to(images.device)
        return torch.zeros_like(images).index_copy(self.axis, stays, self.layer(images.index_select(self.axis, stays)))


class Run(fx.Interpreter):
    """One network on its way through all calibration batches.

    Args:
        model: the network, in evaluation mode.
        graph: its graph, or that of a network of the same architecture.
        batches: the images, `(N, ...)` each.
        memory: bytes of activations to keep between two stops.

    Attributes:
        norms: layers to be replaced by narrower ones.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, batches: Sequence[Tensor], memory: int = MEMORY):
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.batches, self.memory = batches, memory
        self.nodes = list(graph.nodes)
        self.position = {node: position for position, node in enumerate(self.nodes)}
        self.last = {node: max((self.position[user] for user in node.users), default=-1) for node in self.nodes}
        self.kept: dict[int, tuple[int, dict[fx.Node, Any]]] = {}
        self.norms: dict[str, NarrowNorm] = {}

    def states(self, stop: fx.Node) -> Iterator[dict[fx.Node, Any]]:
        """Each batch's values that `stop` or a later node needs; `value` works on the one that was given last."""
        until = self.position[stop]
        kept, used = {}, 0
        for index, batch in enumerate(self.batches):
            start, env = self.kept.pop(index, (0, {}))
            self.env = env
            for position in range(start, until):
                node = self.nodes[position]
                if node not in env and self.last[node] >= position:
                    env[node] = batch if position == 0 else self.run_node(node)
                for done in [node, *node.all_input_nodes]:
                    if self.last[done] <= position:
                        env.pop(done, None)
            yield env
            self.env = env
            tensors = [leaf for leaf in pytree.tree_leaves(list(env.values())) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if used + size <= self.memory:
                kept[index], used = (until, env), used + size
        self.kept = kept

    def value(self, node: fx.Node) -> Any:
        """A node's value for the present batch, computed now if it lies ahead."""
        if node not in self.env:
            for source in node.all_input_nodes:
                self.value(source)
            self.env[node] = self.run_node(node)
        return self.env[node]

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        """The same function, but never in place: the values of other nodes stay what they are."""
        kwargs = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
        return super().call_function(NOT_IN_PLACE.get(target, target), args, kwargs)

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Any:
        """The layer, or the narrow norm in its place."""
        return self.norms[target](*args) if target in self.norms else super().call_module(target, args, kwargs)

    def placeholder(self, target: str, args: tuple, kwargs: dict) -> Any:
        """Further inputs have their default values."""
        return args[0] if args else None


def without_in_place(model: nn.Module) -> list[nn.Module]:
    """Switch in-place activations off; returns them."""
    changed = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in changed:
        module.inplace = False
    return changed
