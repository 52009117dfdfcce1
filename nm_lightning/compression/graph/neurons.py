"""Tensors of neurons: beside each value, which neuron every entry comes from; and what is noted about them.

Neurons are numbers counted over the whole network, `NOBODY` where no removable neuron owns an entry. Such a tensor has
its value's shape, mostly expanded from few numbers, and the functions here take care not to write them out.
"""

import copy
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from nm_lightning.compression.structure.sites import NOBODY, Member


@dataclass
class Tie:
    """Neurons that can only be removed together, pair by pair; `NOBODY` on one side freezes the other."""

    first: Tensor
    second: Tensor
    reason: str
    additive: bool = False


@dataclass
class Quota:
    """Neurons `(n,)` in groups `(n,)` of which equally many must stay.

    With a reason, this must follow from what is tied to what: else the reason is why they can't shrink.
    """

    neurons: Tensor
    groups: Tensor
    reason: str = ""


@dataclass
class Product:
    """Neurons that meet head by head in a product, or that it mixes; by `(heads, d)` neurons of each.

    Attributes:
        node: the product.
        module: whose code this is.
        sides: queries and keys, or values alone.
        rooted: whether it is divided by the root of `d`.
    """

    node: fx.Node
    module: str
    sides: tuple[Tensor, ...]
    rooted: bool = False


@dataclass
class Facts:
    """All that was seen while following, over one graph or several of the same network."""

    blocks: dict[str, Tensor] = field(default_factory=dict)  # layer's first tensor -> the neurons that it makes
    parameters: set[str] = field(default_factory=set)  # blocks that are a bare parameter
    bare: set[str] = field(default_factory=set)  # tensors read outside any layer, as a weight that is transposed
    members: dict[tuple[str, str], Member] = field(default_factory=dict)  # by layer and kind, owners as of the network
    nodes: dict[tuple[str, str], fx.Node] = field(default_factory=dict)  # by the same: where it was first seen
    axes: dict[tuple, Tensor] = field(default_factory=dict)  # tensor and dimension -> the neurons along it
    ties: list[Tie] = field(default_factory=list)
    quotas: list[Quota] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # what layers with a forward of their own read
    grouped: dict[str, Tensor] = field(default_factory=dict)  # layer -> the neurons that each of its groups reads
    as_one: set[str] = field(default_factory=set)  # grouped layers of which whole groups stay or go
    shorter: Set[str] = frozenset()  # modules whose heads get shorter; others' get fewer
    products: list[Product] = field(default_factory=list)
    chains: list[Tensor] = field(default_factory=list)  # neurons `(n,)` that shrink together
    total: int = 0

    def copy(self) -> "Facts":
        """The same facts, to be added to on their own."""
        return Facts(**{entry.name: copy.copy(getattr(self, entry.name)) for entry in fields(self)})


def nobody(value: Any) -> Any:
    """Nobody's entries in the place of a value's tensors; what is no tensor stays."""
    if isinstance(value, Tensor):
        return torch.full((), NOBODY).expand(value.shape)
    return pytree.tree_map_only(Tensor, nobody, value)


def is_nobodys(neurons: Tensor) -> bool:
    """Whether no removable neuron owns any entry."""
    return bool((compact(neurons) == NOBODY).all())


def owned(neurons: Tensor) -> Tensor:
    """The entries that somebody owns: `(n,)`."""
    return neurons[neurons != NOBODY]


def neurons_in(origin: object) -> Tensor:
    """The neurons in whatever a node's value is made of, each once."""
    found = [compact(leaf).flatten() for leaf in pytree.tree_leaves(origin) if isinstance(leaf, Tensor)]
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.long)


def shrink(neurons: Tensor, dims: Iterable[int]) -> Tensor:
    """The first entry along each of `dims`, which stay with size 1.

    >>> shrink(torch.tensor([[3, 3], [4, 4]]), [1])
    tensor([[3],
            [4]])
    """
    sizes = list(neurons.shape)
    for dim in dims:
        sizes[dim] = min(1, sizes[dim])
    return neurons.as_strided(sizes, neurons.stride(), neurons.storage_offset())


def compact(neurons: Tensor) -> Tensor:
    """Without the repetitions that `expand` made."""
    steps = neurons.stride()
    return shrink(neurons, [dim for dim, step in enumerate(steps) if step == 0]) if 0 in steps else neurons


def canonical(neurons: Tensor) -> Tensor:
    """The same neurons in as little memory as they need: one entry along each dimension where nothing changes."""
    dims = [dim for dim in range(neurons.ndim) if neurons.shape[dim] > 1 and constant(neurons, dim)]
    return shrink(neurons, dims).clone().expand_as(neurons)


def constant(neurons: Tensor, dim: int) -> bool:
    """Whether nothing changes along `dim`."""
    neurons = compact(neurons)
    return neurons.shape[dim] < 2 or bool((neurons == neurons.narrow(dim, 0, 1)).all())


def varying(neurons: Tensor) -> list[int]:
    """The dimensions along which the neuron changes.

    >>> varying(torch.tensor([[3, 3], [4, 4]]))
    [0]
    """
    return [dim for dim in range(neurons.ndim) if not constant(neurons, dim)]


def lay_along(neurons: Tensor, dim: int, ndim: int) -> Tensor:
    """Neurons `(n,)` as a tensor of `ndim` dimensions, all of size 1 but `dim`."""
    shape = [1] * ndim
    shape[dim] = -1
    return neurons.view(shape)


def along(neurons: Tensor, dim: int) -> Tensor:
    """The neuron of each position along `dim`: `(n,)`."""
    dim %= neurons.ndim
    return shrink(neurons, [other for other in range(neurons.ndim) if other != dim]).reshape(-1)


def components(count: int, pairs: list[Tensor]) -> Tensor:
    """Labels of `count` things that `(2, m)` pairs connect.

    >>> components(4, [torch.tensor([[0, 3], [1, 3]])])
    tensor([0, 0, 1, 2])
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = torch.cat(pairs, dim=1).numpy() if pairs else np.zeros((2, 0), dtype=np.int64)
    graph = coo_matrix((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def groups_as_one(facts: Facts) -> set[str]:
    """The grouped layers each of whose groups reads what stays or goes as one, but not all groups the same."""
    same = components(facts.total + 1, tied_pairs(facts))
    runs = {name: same[neurons] for name, neurons in facts.grouped.items()}
    return {name for name, run in runs.items() if (run == run[:, :1]).all() and len(run.unique()) > 1}


def tied_pairs(facts: Facts) -> list[Tensor]:
    """The ties as `(2, m)` pairs, with `facts.total` for what no neuron owns."""
    pairs = [torch.stack([tie.first, tie.second]) for tie in facts.ties]
    return [torch.where(pair == NOBODY, facts.total, pair) for pair in pairs]
