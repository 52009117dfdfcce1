"""A network's values at some nodes to first order in some of its parameters, walked forward and backward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from nm_lightning.compression.statistics.runs import Run, Tensors
from nm_lightning.compression.structure.operations import SOLVABLE


class Linear:
    """One batch, linearised: what both directions need is computed once and kept.

    Backward autograd walks the graph that it has recorded. Forward each node is told how what it reads changes: a
    layer is linear in that and in its weight, so it is called on either; all else is differentiated by itself.

    Args:
        run: the network on its way; its `env` is changed.
        env: the batch's values so far.
        ends: the nodes whose values count.
        tensors: of the parameters makes what `Run.swapped` holds.
        start: the parameters, by name.

    Attributes:
        values: at the ends.
    """

    def __init__(
        self,
        run: Run,
        env: Mapping[fx.Node, Any],
        ends: Sequence[fx.Node],
        tensors: Callable[[Mapping[str, Tensor]], Tensors],
        start: Mapping[str, Tensor],
    ):
        self.run, self.ends, self.tensors = run, ends, tensors
        self.free = {name: value.detach().requires_grad_() for name, value in start.items()}
        with torch.enable_grad():
            self.graph = run.values(env, ends, tensors(self.free))
        self.env = {node: pytree.tree_map_only(Tensor, Tensor.detach, value) for node, value in run.env.items()}
        self.values = [self.env[end] for end in ends]
        self.path = sorted(self.env.keys() - env.keys(), key=run.position.get)

    @property
    def size(self) -> int:
        """Bytes that it keeps, of values and of what autograd needs besides, about."""
        return 2 * sum(each.numel() * each.element_size() for node in self.path for each in floats(self.env[node]))

    def pull(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """`J^T c`: by parameter, from one tensor at each end."""
        wanted = list(self.free.values())
        found = torch.autograd.grad(self.graph, wanted, cotangents, retain_graph=True, materialize_grads=True)
        return dict(zip(self.free, found, strict=True))

    def push(self, direction: Mapping[str, Tensor]) -> list[Tensor]:
        """`J d`: at each end, from a tensor for each parameter."""
        start = {name: value.detach() for name, value in self.free.items()}
        tangent = {name: value.to(start[name].dtype) for name, value in direction.items()}
        swapped, moved = torch.func.jvp(self.tensors, (start,), (tangent,))
        changes: dict[fx.Node, list[Tensor]] = {}  # by node, of its floating-point tensors
        for node in self.path:
            own = moved.get(node.target) if node.op == "call_module" else None
            if own is not None or any(source in changes for source in node.all_input_nodes):
                change = self.change(node, swapped.get(node.target) if own is not None else None, own, changes)
                changes |= {node: change} if change else {}
        return [changes[end][0] if end in changes else torch.zeros_like(self.env[end]) for end in self.ends]

    def change(self, node: fx.Node, tensors: Any, moved: Any, changes: Mapping[fx.Node, list[Tensor]]) -> list[Tensor]:
        """How a node's tensors change where what it reads changes, and its own tensors from `tensors` by `moved`."""
        read = {source: self.env[source] for source in node.all_input_nodes}
        sources = [source for source in read if source in changes]
        layer = self.run.module.get_submodule(node.target) if moved is not None else None
        if isinstance(layer, SOLVABLE) and type(layer).__module__.startswith("torch.nn."):
            (source,) = read
            change = torch.func.functional_call(layer, moved, (read[source],))
            if sources:
                still = {key: value if key == "weight" else torch.zeros_like(value) for key, value in tensors.items()}
                change = change + torch.func.functional_call(layer, still, (changes[source][0],))
            return [change]

        def value(tensors: Any, *parts: list[Tensor]) -> list[Tensor]:
            self.run.env = read | {
                source: with_floats(read[source], part) for source, part in zip(sources, parts, strict=True)
            }
            self.run.swapped = {} if tensors is None else {node.target: tensors}
            try:
                return floats(self.run.run_node(node))
            finally:
                self.run.swapped = {}

        if not floats(self.env[node]):
            return []
        parts = [floats(read[source]) for source in sources]
        tangents = [changes[source] for source in sources]
        if moved is None:
            return torch.func.jvp(lambda *parts: value(None, *parts), tuple(parts), tuple(tangents))[1]
        return torch.func.jvp(value, (tensors, *parts), (moved, *tangents))[1]


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a node's value."""
    return [leaf for leaf in pytree.tree_leaves(tree) if is_float(leaf)]


def with_floats(tree: Any, parts: Sequence[Tensor]) -> Any:
    """A node's value with others in the place of its floating-point tensors."""
    others = iter(parts)
    return pytree.tree_map(lambda leaf: next(others) if is_float(leaf) else leaf, tree)


def is_float(leaf: Any) -> bool:
    """Whether it has derivatives."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
