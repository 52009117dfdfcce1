"""What travels between the rooms: sites, and the layers that have a share in them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Member:
    """A layer's share in a site: one axis of its tensors.

    Attributes:
        name: the layer's name in the network.
        slots: the tensors that have this axis, `(tensor's name, dimension)`, the weight first.
        counts: the layer's attributes that tell the axis' length, each with the divisor of that length.
        owner: `(n,)`, for each position along the axis the site's neuron that owns it, -1 where none does.
        groups: of a grouped convolution; its columns' dimension is as long as one group.
        axis: the neurons' dimension in the activations that the layer reads.
    """

    name: str
    slots: list[tuple[str, int]]
    counts: dict[str, int]
    owner: Tensor
    groups: int = 1
    axis: int = 1

    def even(self, neurons: int) -> bool:
        """Whether each of so many neurons owns equally many positions."""
        counts = torch.bincount(self.owner[self.owner >= 0], minlength=neurons)
        return bool((counts == counts[0]).all())

    def positions(self) -> Tensor:
        """The positions each neuron owns: `(neurons, positions of each)`, in order; only if `even`."""
        neurons = int(self.owner.max()) + 1
        order = torch.argsort(self.owner, stable=True)
        return order[int((self.owner < 0).sum()) :].view(neurons, -1)


@dataclass
class Consumer(Member):
    """A layer that reads the site's neurons.

    Attributes:
        norm: the BatchNorm between the producer and this layer, if there is one.
        obstacle: why a scaled neuron would not arrive here scaled; empty where it does.
        node: the name of its node in the network's graph.
    """

    norm: str | None = None
    obstacle: str = ""
    node: str = ""


@dataclass
class Site:
    """Neurons that can shrink together.

    Attributes:
        name: the first producer's name.
        width: number of neurons.
        producers: the layers whose rows the neurons are, in the order of execution.
        passed: per-channel layers on the way, sliced like the producers.
        consumers: the layers that read the neurons.
        cells: `(width,)`, the cell of each neuron; equally many must stay in each.
        coupled: whether the producers are added together, as along a residual stream.
    """

    name: str
    width: int
    producers: list[Member]
    passed: list[Member]
    consumers: list[Consumer]
    cells: Tensor
    coupled: bool = False

    @property
    def step(self) -> int:
        """The number of cells: a width is a multiple of it."""
        return int(self.cells.max()) + 1


@dataclass
class Trace:
    """What `trace` found: the sites in the order of execution, and each other layer with the reason it stays."""

    sites: list[Site]
    skipped: dict[str, str] = field(default_factory=dict)
