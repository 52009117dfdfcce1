"""From what was seen while following to sites: neurons tied to each other and to nothing that must stay."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor, fx

from nm_lightning.compression.graph.attention import renumbered
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import Facts, components, neurons_in, owned, tied_pairs
from nm_lightning.compression.graph.nodes import operation_at_home
from nm_lightning.compression.graph.rules import known, taught
from nm_lightning.compression.structure.sites import NOBODY, Consumer, Member, Pair, Site, Trace

SHARES = 8  # into which a site's cells can be cut, at least: fewer leave too little choice of widths

# All tables here have an entry for each neuron and one more, the last, for nobody: `table[NOBODY]` is it.


def collect(facts: Facts, followers: list[Follower], pairs: Sequence[Pair] = ()) -> Trace:
    """The sites, and why the other layers stay.

    Args:
        facts: what was seen.
        followers: that saw it.
        pairs: of layers that are multiplied by each other, their neurons counted over the network.
    """
    ties = tied_pairs(facts)
    neuron = components(facts.total + 1, ties)  # what stays or goes as one
    stuck = _stuck(facts, neuron)
    runs = [part for block in facts.blocks.values() for part in (block[stuck[block]], block[~stuck[block]])]
    chains = [torch.stack([part[:-1], part[1:]]) for part in (*runs, *facts.chains)]
    apart = [pair[:, (pair != facts.total).all(dim=0)] for pair in ties]
    component = components(facts.total + 1, apart + chains)  # what shrinks together
    makers = _first_makers(facts, neuron)
    reasons, coupled = _reasons(facts, ties, component), _coupled(facts, apart, component)

    members: dict[int, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for key, member in facts.members.items():
        parameter = member.kind == "rows" and member.slots[0][0] in facts.parameters
        for index in component[owned(member.owner)].unique().tolist():
            members[index]["parameters" if parameter else member.kind].append(key)

    carriers = {
        node: set(component[owned(neurons_in(origin))].unique().tolist())
        for follower in followers
        for node, origin in follower.origins.items()
    }
    found = Trace([], _not_looked_into(followers))
    for index, keys in members.items():
        inside = component == index
        inside[NOBODY] = False
        classes, numbers = neuron[inside].unique(return_inverse=True)
        number = torch.full_like(component, NOBODY)
        number[inside] = numbers  # the site's numbering

        cells, unfit = _cells(facts, number, len(classes))
        cells = cells if unfit else _even(cells, makers[classes])
        own = [renumbered(pair, number) for pair in pairs if component[pair.neurons[0, 0]] == index]
        if not keys["columns"] and not own:
            unfit = "no layer reads its neurons"
        elif len(classes) < 2:
            unfit = "its neurons stay or go as one"
        reason = reasons.get(index, unfit)
        producers = [_renumbered(facts.members[key], number) for key in keys["rows"]]
        if reason or not producers:
            found.skipped |= {member.name: reason for member in producers}
            continue
        consumers = []
        for key in keys["columns"]:
            norm, obstacle = _path(followers, carriers, facts.nodes[key], index)
            member = _renumbered(facts.members[key], number)
            consumers.append(Consumer(**vars(member), norm=norm, obstacle=obstacle))
        passed = [_renumbered(facts.members[key], number) for key in keys["channels"] + keys["parameters"]]
        found.sites.append(
            Site(producers[0].name, len(classes), producers, passed, consumers, cells, index in coupled, own)
        )
    for site in found.sites:  # of its other neurons nothing is said
        for member in site.producers:
            found.skipped.pop(member.name, None)
    return found


def _stuck(facts: Facts, neuron: Tensor) -> Tensor:
    """Whether each neuron stays for itself `(neurons + 1,)`; the others of its layer may shrink without it."""
    frozen = [owned(neurons) for neurons, _ in facts.frozen] + [torch.tensor([facts.total])]
    return torch.isin(neuron, neuron[torch.cat(frozen)].unique())


def _reasons(facts: Facts, ties: list[Tensor], component: Tensor) -> dict[int, str]:
    """Why components can't shrink: the first reason of each."""
    reasons: dict[int, str] = {}
    for neurons, reason in facts.frozen:
        for index in component[owned(neurons)].unique().tolist():
            reasons.setdefault(index, reason)
    for pair, tie in zip(ties, facts.ties, strict=True):
        ends = pair[:, (pair == facts.total).any(dim=0)]
        for index in component[ends[ends != facts.total]].unique().tolist():
            reasons.setdefault(index, f"{tie.reason}, which can't shrink")
    return reasons


def _coupled(facts: Facts, ties: list[Tensor], component: Tensor) -> set[int]:
    """The components in which neurons of several blocks are added together."""
    block_of = torch.empty_like(component)
    for number, block in enumerate(facts.blocks.values()):
        block_of[block] = number
    coupled = set()
    for pair, tie in zip(ties, facts.ties, strict=True):
        if tie.additive:
            across = pair[0, block_of[pair[0]] != block_of[pair[1]]]
            coupled |= set(component[across].unique().tolist())
    return coupled


def _not_looked_into(followers: list[Follower]) -> dict[str, str]:
    """Modules with weights that no rule knows."""
    skipped = {}
    for follower in followers:
        for node in follower.graph.nodes:
            if node.op == "call_module":
                layer = follower.root.get_submodule(node.target)
                followed = taught(layer) or known(operation_at_home(node, layer))
                if next(layer.parameters(), None) is not None and not followed:
                    skipped[node.target] = f"nn.{type(layer).__name__} is not looked into"
    return skipped


def _renumbered(member: Member, number: Tensor) -> Member:
    """A layer's share in one site: the owners are the site's neurons."""
    return replace(member, owner=number[member.owner])


def _cells(facts: Facts, number: Tensor, width: int) -> tuple[Tensor, str]:
    """The finest partition `(width,)` that all quotas on a site's neurons ask for, and why there is none, if so."""
    cells = torch.zeros(width, dtype=torch.long)
    for quota in facts.quotas:
        own = number[quota.neurons]
        inside = own >= 0
        if not inside.any():
            continue
        counts = torch.zeros(width, int(quota.groups.max()) + 1, dtype=torch.long)
        counts.index_put_((own[inside], quota.groups[inside]), torch.tensor(1), accumulate=True)
        if (counts == counts[:, :1]).all():
            continue  # every neuron has an equal part in each group
        if quota.reason:
            return cells, quota.reason
        if len(counts.sum(dim=0).unique()) > 1:
            return cells, "its neurons are spread unevenly over groups"
        _, group = counts.unique(dim=0, return_inverse=True)  # those with equally many in each group
        _, cells = torch.stack([cells, group]).unique(dim=1, return_inverse=True)
    shares = gcd(*cells.bincount().tolist())  # of each cell the same one goes
    return cells, "its groups have one neuron each, or no share in common" if shares == 1 else ""


def _first_makers(facts: Facts, neuron: Tensor) -> Tensor:
    """For each label of what stays or goes as one, the number of the first block that has a neuron of it."""
    makers = torch.full_like(neuron, len(facts.blocks))
    for number, block in reversed(list(enumerate(facts.blocks.values()))):
        makers[neuron[block]] = number
    return makers


def _even(cells: Tensor, makers: Tensor) -> Tensor:
    """Where a stream grew by what was put beside it, the same share goes of each part, if the parts allow it."""
    _, finer = torch.stack([cells, makers]).unique(dim=1, return_inverse=True)
    return finer if gcd(*finer.bincount().tolist()) >= SHARES else cells


def _path(
    followers: list[Follower], carriers: dict[fx.Node, set[int]], consumer: fx.Node, index: int
) -> tuple[str | None, str]:
    """What lies between a component's neurons and a consumer: the norm directly behind the producer, an obstacle."""
    follower = next(follower for follower in followers if consumer in follower.origins)
    steps, pending = set(), list(consumer.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in steps and index in carriers[node] and follower.roles.get(node) != "produce":
            steps.add(node)
            pending += node.all_input_nodes
    ordered = [node for node in follower.graph.nodes if node in steps]
    norm = None
    for position, node in enumerate(ordered):
        role = follower.roles[node]
        if role == "norm":
            if norm is not None or any(follower.roles[before] != "move" for before in ordered[:position]):
                return None, f"{node.target} normalises behind another layer"
            norm = node.target
        elif role not in ("move", "scale"):
            return norm, role
    return norm, ""
