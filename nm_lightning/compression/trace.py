"""First room: find the sites, the sets of hidden neurons that can shrink together.

`follow.py` watches which neuron each entry of each activation comes from; here what it saw becomes sites. Every site
is then tried out on a copy without data: a network narrowed at all of them must run, and its layers must read exactly
the neurons that they are meant to. A site that fails is left alone, with the reason.
"""

import copy
import traceback
from collections import defaultdict

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nm_lightning.compression.fold import apply_plan, plan_sites
from nm_lightning.compression.follow import FIXED, LAYERS, Access, Facts, Follower, compact
from nm_lightning.compression.select import keep_of
from nm_lightning.compression.sites import Consumer, Member, Site, Trace
from nm_lightning.errors import InputError

SCOPES = ("hidden", "all")


def trace(model: nn.Module, example_input: Tensor, scope: str = "hidden") -> Trace:
    """Find every site of a network.

    Args:
        model: any network that `torch.fx` can trace; its weights are only read.
        example_input: a batch that `model` accepts; only its shape and dtype matter.
        scope: `hidden` for neurons inside a block, `all` for residual streams too.

    Returns:
        The sites, and the layers that can't be compressed with the reason why.

    Raises:
        InputError: the network can't be traced, or does not accept the example.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(site.name, site.width, [c.name for c in site.consumers]) for site in trace(net, torch.zeros(1, 4)).sites]
    [('0', 8, ['2'])]
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
    facts = Facts()
    try:
        hollow = without_data(model).eval()
        example = _like(example_input[:1], hollow)
        followers = [_follow(hollow, example, facts)]
    except InputError:  # a tensor that is no buffer stays where it is, and does not meet the meta device
        hollow, facts = copy.deepcopy(model).eval(), Facts()
        example = _like(example_input[:1], hollow)
        followers = [_follow(hollow, example, facts)]
    seen = {tensor for access in facts.accesses.values() for tensor, _ in access.slots}
    if any(name not in seen for name, _ in hollow.named_parameters()):  # auxiliary heads exist only in training
        try:
            more = facts.copy()
            followers.append(_follow(hollow.train(), example.expand(2, *example.shape[1:]), more))
            facts = more
        except InputError:
            pass  # the network as it is evaluated is known
        hollow.eval()
    _check_own_forwards(model, facts)
    for access in facts.accesses.values():
        read = [tensor for tensor, _ in access.slots if tensor in facts.bare - facts.parameters]
        if read:
            facts.frozen.append((access.names[access.names != FIXED], f"{read[0]} is also read outside its layer"))
    found = _collect(facts, followers)
    _try_out(model, hollow, example, facts, found)
    if scope == "hidden":
        for site in [site for site in found.sites if site.coupled]:
            names = [member.name for member in site.producers]
            for name in names:
                others = [other for other in names if other != name]
                listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
                found.skipped[name] = f"added to the neurons of {listed or name}: --scope all shrinks them"
            found.sites.remove(site)
    return found


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a network on PyTorch's meta device: shapes without memory."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo).to("meta")


def _like(example: Tensor, model: nn.Module) -> Tensor:
    """The example on the network's device, and in its dtype if it is a floating-point one."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return example
    return example.to(parameter.device, parameter.dtype if example.is_floating_point() else None)


def _follow(hollow: nn.Module, example: Tensor, facts: Facts, given: dict[str, Tensor] | None = None) -> Follower:
    try:
        follower = Follower(hollow, facts, given)
    except Exception as error:  # fx raises whatever the user's forward raises on symbolic values
        raise InputError(
            f"{type(hollow).__name__} can't be traced by torch.fx: {_first_line(error)}{_users_line(error)}"
        ) from error
    with torch.no_grad():
        try:
            follower.run(example)
        except Exception as error:  # whatever the user's forward raises
            raise InputError(
                f"{type(hollow).__name__} rejects an input of shape {tuple(example.shape)}: {_first_line(error)}"
            ) from error
    return follower


def _check_own_forwards(model: nn.Module, facts: Facts) -> None:
    """Freeze what a subclass reads whose forward is not linear in its weight, as one that standardises it."""
    for name, shape in facts.shapes.items():
        access = facts.accesses.get((name, "columns"))
        if access is None:
            continue
        layer = copy.deepcopy(model.get_submodule(name)).eval()
        weight, dim = layer.weight.data, access.slots[0][1]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        shape = [-1 if position == dim else 1 for position in range(weight.ndim)]
        half = (torch.arange(weight.shape[dim], device=weight.device) % 2).view(shape)
        with torch.no_grad():
            whole = layer(images)
            parts = []
            for mask in (half, 1 - half, 0 * half):
                layer.weight.data = weight * mask
                parts.append(layer(images))
        gap = (parts[0] + parts[1] - parts[2] - whole).abs().max()
        if not gap <= 1e-3 * whole.abs().max():
            reason = f"{name} ({type(layer).__name__}) has a forward that is not linear in its weight"
            facts.frozen.append((access.names[access.names != FIXED], reason))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _users_line(error: Exception) -> str:
    """Where in the user's code an error arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename.replace("\\", "/")]
    frames = [frame for frame in frames if frame.filename != __file__]
    return f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


# -- from what was seen to sites


def _components(count: int, pairs: list[Tensor]) -> Tensor:
    """Labels of `count` things that `(2, m)` pairs connect."""
    edges = torch.cat(pairs, dim=1).numpy() if pairs else np.zeros((2, 0), dtype=np.int64)
    graph = coo_matrix((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(count, count))
    return torch.from_numpy(connected_components(graph, directed=False)[1]).long()


def _tied_pairs(facts: Facts) -> list[Tensor]:
    """The ties as `(2, m)` pairs, with `facts.total` for what no neuron owns."""
    pairs = [torch.stack([tie.first, tie.second]) for tie in facts.ties]
    return [torch.where(pair == FIXED, facts.total, pair) for pair in pairs]


def _collect(facts: Facts, followers: list[Follower]) -> Trace:
    """The sites: neurons tied to each other and to nothing that must stay."""
    fixed = facts.total  # one more node, for what no neuron owns
    ties = _tied_pairs(facts)
    neuron = _components(fixed + 1, ties)  # what stays or goes as one
    chains = [torch.stack([names[:-1], names[1:]]) for names in facts.blocks.values() if len(names) > 1]
    free = [pair[:, (pair != fixed).all(dim=0)] for pair in ties]
    component = _components(fixed + 1, free + chains)  # what shrinks together

    reasons: dict[int, str] = {}
    for names, reason in facts.frozen:
        for index in component[names[names != FIXED]].unique().tolist():
            reasons.setdefault(index, reason)
    for pair, tie in zip(ties, facts.ties, strict=True):
        ends = pair[:, (pair == fixed).any(dim=0)]
        for index in component[ends[ends != fixed]].unique().tolist():
            reasons.setdefault(index, f"{tie.reason}, which can't shrink")
    reasons.pop(int(component[fixed]), None)

    block_of = torch.empty(fixed + 1, dtype=torch.long)
    for number, names in enumerate(facts.blocks.values()):
        block_of[names] = number
    coupled = set()
    for pair, tie in zip(ties, facts.ties, strict=True):
        if tie.additive:
            pair = pair[:, (pair != fixed).all(dim=0)]
            across = pair[0, block_of[pair[0]] != block_of[pair[1]]]
            coupled |= set(component[across].unique().tolist())

    members: dict[int, dict[str, list[Access]]] = defaultdict(lambda: defaultdict(list))
    order: list[int] = []
    for access in facts.accesses.values():
        for index in component[access.names[access.names != FIXED]].unique().tolist():
            members[index][access.kind.partition(" ")[0]].append(access)
            order += [index] if index not in order else []

    carriers = _carriers(followers, component)
    found = Trace([])
    for follower in followers:
        for node in follower.graph.nodes:
            if node.op == "call_module":
                layer = follower.fetch_attr(node.target)
                held = next(layer.parameters(), None) is not None
                if held and not isinstance(layer, (*LAYERS, nn.MultiheadAttention)):
                    found.skipped[node.target] = f"nn.{type(layer).__name__} is not looked into"
    for index in order:
        rows = [access for access in members[index]["rows"] if access.slots[0][0] not in facts.parameters]
        inside = torch.zeros(fixed + 1, dtype=torch.bool)
        inside[:fixed] = component[:fixed] == index
        classes, numbers = neuron[inside].unique(return_inverse=True)
        number = torch.full((fixed + 1,), -1)
        number[inside] = numbers

        def owner(access: Access, number: Tensor = number, fixed: int = fixed) -> Tensor:
            return number[torch.where(access.names == FIXED, fixed, access.names)]

        reason = reasons.get(index, "")
        if not members[index]["columns"]:
            reason = reason or "no layer reads its neurons"
        elif len(classes) < 2:
            reason = reason or "its neurons stay or go as one"
        cells, unfit = _cells(facts, number, len(classes))
        reason = reason or unfit
        if not reason and int(cells.max()) + 1 == len(classes):
            reason = "its groups have one neuron each"
        if reason or not rows:
            found.skipped |= {access.layer: reason for access in rows}
            continue

        def member(access: Access, owner=owner) -> dict:
            own = {"name": access.layer, "slots": access.slots, "counts": access.counts}
            return own | {"owner": owner(access), "groups": access.groups, "axis": access.axis}

        paths = [_path(followers, carriers, access, index) for access in members[index]["columns"]]
        parameters = [access for access in members[index]["rows"] if access.slots[0][0] in facts.parameters]
        found.sites.append(
            Site(
                name=rows[0].layer,
                width=len(classes),
                producers=[Member(**member(access)) for access in rows],
                passed=[Member(**member(access)) for access in members[index]["channels"] + parameters],
                consumers=[
                    Consumer(**member(access), norm=norm, obstacle=obstacle, node=access.node.name)
                    for access, (norm, obstacle) in zip(members[index]["columns"], paths, strict=True)
                ],
                cells=cells,
                coupled=index in coupled,
            )
        )
    return found


def _cells(facts: Facts, number: Tensor, width: int) -> tuple[Tensor, str]:
    """The finest partition `(width,)` that all quotas on a site's neurons ask for, and why there is none, if so."""
    cells = torch.zeros(width, dtype=torch.long)
    for quota in facts.quotas:
        own = torch.where(quota.names == FIXED, -1, number[quota.names.clamp(min=0)])
        inside = own >= 0
        if not inside.any():
            continue
        counts = torch.zeros(width, int(quota.groups.max()) + 1, dtype=torch.long)
        counts.index_put_((own[inside], quota.groups[inside]), torch.tensor(1), accumulate=True)
        if (counts == counts[:1]).all() and (counts[0] == counts[0, 0]).all():
            continue  # every neuron has an equal part in each group
        one_each = len(counts[counts > 0].unique()) == 1 and not ((counts > 0).sum(dim=1) > 1).any()
        if not one_each or len(counts.sum(dim=0).unique()) > 1:
            return cells, "its neurons are spread unevenly over groups"
        group = torch.where(counts.sum(dim=1) > 0, counts.argmax(dim=1), -1)
        _, cells = torch.stack([cells, group]).unique(dim=1, return_inverse=True)
    if len(torch.bincount(cells).unique()) > 1:
        return cells, "its neurons are spread unevenly over groups"
    return cells, ""


def _carriers(followers: list[Follower], component: Tensor) -> dict[fx.Node, set[int]]:
    """The components whose neurons each node's value carries."""
    return {
        node: set(component[(names := _names_of(origin))[names != FIXED]].unique().tolist())
        for follower in followers
        for node, origin in follower.origins.items()
    }


def _path(
    followers: list[Follower], carriers: dict[fx.Node, set[int]], consumer: Access, index: int
) -> tuple[str | None, str]:
    """What lies between a component's neurons and a consumer: the norm directly behind the producer, an obstacle."""
    follower = next(f for f in followers if consumer.node in f.origins)
    steps, pending = set(), list(consumer.node.all_input_nodes)
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


def _try_out(model: nn.Module, narrow: nn.Module, example: Tensor, facts: Facts, found: Trace) -> None:
    """Narrow a copy of the model at all sites and follow it again; sites where it goes wrong move to `skipped`."""
    generator = torch.Generator().manual_seed(0)
    same = _components(facts.total + 1, _tied_pairs(facts))
    while found.sites:
        keeps = {site.name: _some(site, generator) for site in found.sites}
        apply_plan(narrow, plan_sites(found.sites, keeps))
        stays = torch.ones(facts.total, dtype=torch.bool)
        home = torch.full((facts.total,), -1)
        for number, site in enumerate(found.sites):
            for member in [*site.producers, *site.passed]:
                block = facts.blocks.get(member.slots[0][0]) if member.slots else None
                if block is not None:
                    home[block] = number
                    stays[block] = torch.isin(member.owner, keeps[site.name])
        given = {key: names[stays[names]] for key, names in facts.blocks.items()}
        seen, bad = Facts(), {}
        follower = None
        try:
            follower = Follower(narrow, seen, given)
            with torch.no_grad():
                follower.run(example)
        except Exception as error:  # whatever the user's forward does where its numbers no longer fit
            done = set(follower.origins) if follower else set()
            nodes = follower.graph.nodes if follower else []
            failed = next((node for node in nodes if node not in done), None)
            names = torch.arange(facts.total) if failed is None else _names_behind(follower, failed)
            touched = home[names[names != FIXED]].unique()
            line = _first_line(error)
            bad = {int(number): f"a narrower network fails at {failed}: {line}" for number in touched if number >= 0}
            if not bad:
                bad = dict.fromkeys(range(len(found.sites)), f"a narrower network fails: {line}")
        else:
            for key, access in facts.accesses.items():
                if key not in seen.accesses or access.kind == "rows":
                    continue
                before, after = access.names, seen.accesses[key].names
                kept = (before == FIXED) | stays[before.clamp(min=0)]
                expected = same[torch.where(before == FIXED, facts.total, before)][kept]
                actual = same[torch.where(after == FIXED, facts.total, after)]
                if not torch.equal(expected, actual):
                    touched = home[before[before != FIXED]].unique()
                    bad |= {int(n): f"{access.layer} would read other neurons" for n in touched if n >= 0}
        if not bad:
            return
        for number in sorted(bad, reverse=True):
            site = found.sites.pop(number)
            found.skipped |= {member.name: bad[number] for member in site.producers}
        narrow = (without_data(model) if example.is_meta else copy.deepcopy(model)).eval()


def _names_of(origin: object) -> Tensor:
    """The neurons in whatever a node's value is made of, each once."""
    found = [compact(leaf).flatten() for leaf in pytree.tree_leaves(origin) if isinstance(leaf, Tensor)]
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.long)


def _names_behind(follower: Follower, node: fx.Node) -> Tensor:
    """The neurons that a node's arguments carry, or whose number they are: a size comes from the tensor it measures."""
    found, pending, seen = [torch.empty(0, dtype=torch.long)], list(node.all_input_nodes), set()
    while pending:
        source = pending.pop()
        if source not in seen:
            seen.add(source)
            found.append(_names_of(follower.origins.get(source)))
            pending += [] if len(found[-1]) else source.all_input_nodes
    return torch.cat(found).unique()


def _some(site: Site, generator: torch.Generator) -> Tensor:
    """A random share of each cell, never the same for all sites, so that no two fit by chance."""
    size = site.width // site.step
    scores, share = torch.rand(site.width, generator=generator), torch.rand(1, generator=generator).item()
    return keep_of(site, scores, site.step * min(size - 1, max(1, round(size * (0.25 + 0.6 * share)))))
