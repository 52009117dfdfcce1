"""What travels between the rooms: sites, and the layers that have a share in them."""

from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd

import torch
from torch import Tensor

NOBODY = -1  # the owner of a position that no removable neuron owns, such as the network's input


@dataclass
class Member:
    """A layer's share in a set of neurons: one axis of its tensors.

    While a graph is followed the neurons are counted over the whole network, in a site over the site.

    Attributes:
        name: the layer's name in the network.
        kind: `rows` (the layer makes the neurons), `columns` (it reads them) or `channels` (they pass through it).
        slots: the tensors that have this axis, `(tensor's name, dimension)`, the weight first.
        counts: the layer's attributes that tell the axis' length, each with the divisor of that length.
        owner: `(positions,)`, for each position along the axis the neuron that owns it, `NOBODY` where none does.
        groups: of a grouped convolution; its columns' dimension is as long as one group.
        axis: the neurons' dimension in the activations that the layer reads.
        node: the name of its node in the network's graph.
        called: whether the code calls the layer there, and does not only read its weight.
    """

    name: str
    kind: str
    slots: list[tuple[str, int]]
    counts: dict[str, int | Fraction]
    owner: Tensor
    groups: int = 1
    axis: int = 1
    node: str = ""
    called: bool = False

    def even(self, neurons: int) -> bool:
        """Whether each of so many neurons owns equally many positions."""
        counts = torch.bincount(self.owner[self.owner >= 0], minlength=neurons)
        return bool((counts == counts[0]).all())

    def positions(self) -> Tensor:
        """The positions each neuron owns: `(neurons, positions of each)`, in order; only if `even`."""
        neurons = int(self.owner.max()) + 1
        order = torch.argsort(self.owner, stable=True)
        return order[int((self.owner < 0).sum()) :].view(neurons, -1)

    def stays(self, keep: Tensor) -> Tensor:
        """Whether each position stays `(positions,)` when the neurons `keep` `(k,)` do; what nobody owns does."""
        stays = torch.zeros(int(max(self.owner.max(), keep.max())) + 2, dtype=torch.bool, device=keep.device)
        stays[keep] = stays[NOBODY] = True
        return stays[self.owner.to(keep.device)]


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
class Pair:
    """Two Linear layers whose outputs, or whose output and input, are multiplied head by head, with nothing between.

    Any invertible map of a head on the one side with its inverse on the other leaves the network as it is.

    Attributes:
        module: whose code multiplies.
        neurons: `(heads, d)`, the site's neurons.
        maker: the layer of the queries or values.
        rows: `(heads, d)`, its rows.
        other: the layer of the keys, or the one that reads the values that attention has mixed.
        places: `(heads, d)`, its rows, or its columns.
        dim: of its weight: 0 for rows, 1 for columns.
        rooted: whether the product is divided by the root of `d`, which is counted as the network runs.
        centred: whether a softmax over the keys follows, which ignores what they have in common.
    """

    module: str
    neurons: Tensor
    maker: str
    rows: Tensor
    other: str
    places: Tensor
    dim: int
    rooted: bool = False
    centred: bool = False

    def gone(self, keep: Tensor) -> Tensor:
        """The maker's rows whose neurons are not among `keep` `(k,)`."""
        return self.rows[~torch.isin(self.neurons, keep)]


@dataclass
class Site:
    """Neurons that can shrink together.

    Attributes:
        name: the first producer's name.
        width: number of neurons.
        producers: the layers whose rows the neurons are, in the order of execution.
        passed: per-channel layers on the way, sliced like the producers.
        consumers: the layers that read the neurons.
        cells: `(width,)`, the cell of each neuron; the same share must stay of each.
        coupled: whether the producers are added together, as along a residual stream.
        pairs: of layers that make or read the dimensions of an attention's heads.
    """

    name: str
    width: int
    producers: list[Member]
    passed: list[Member]
    consumers: list[Consumer]
    cells: Tensor
    coupled: bool = False
    pairs: list[Pair] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The least width of which every cell gets its share: a width is a multiple of it."""
        return self.width // gcd(*self.cells.bincount().tolist())

    def survivors(self, scores: Tensor, width: int) -> Tensor:
        """The best `width` neurons, ascending, or a few more where a layer, or a part split off, would lose all.

        Args:
            scores: `(self.width,)`; among equal ones the first neurons stay.
            width: a multiple of `step`; the same share of each cell stays.
        """
        scores = scores.clone()
        members = self.producers + [member for member in self.passed if not member.slots]  # parts have no tensors
        for member in members:  # each keeps its best
            owned = member.owner[member.owner >= 0].unique()
            scores[owned[scores[owned].argmax()]] += scores.abs().max() * 2 + 1
        while True:
            keep = largest(scores, width, self.cells)
            if width == self.width or all(torch.isin(member.owner, keep).any() for member in members):
                return keep
            width += self.step


def largest(scores: Tensor, width: int, cells: Tensor | None = None) -> Tensor:
    """The indices of the `width` largest scores, ascending; among equal scores the first neurons stay.

    Args:
        scores: `(n,)`.
        width: how many stay.
        cells: `(n,)`, the cell of each neuron; the same share of each stays, a whole number. None for one cell.

    >>> largest(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)
    tensor([0, 2])
    >>> largest(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2, cells=torch.tensor([0, 1, 0, 1]))
    tensor([0, 3])
    """
    order = torch.argsort(scores, descending=True, stable=True)
    cells = torch.zeros(len(scores), dtype=torch.long) if cells is None else cells
    order = order[torch.argsort(cells[order], stable=True)]
    sizes, cell = cells.bincount(), cells[order]
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[cell]
    return order[rank < (sizes * width // len(order))[cell]].sort().values


@dataclass
class Trace:
    """What `trace` found: the sites in the order of execution, and each other layer with the reason it stays."""

    sites: list[Site]
    skipped: dict[str, str] = field(default_factory=dict)
