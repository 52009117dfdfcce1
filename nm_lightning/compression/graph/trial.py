"""Every site is tried out: a network narrowed at all of them must run, and its layers read the neurons meant for them.

It is a copy without data. A site that fails is left alone, with the reason.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import Facts, along, components, neurons_in, owned, tied_pairs
from nm_lightning.compression.structure.copies import with_data, without_data
from nm_lightning.compression.structure.inputs import Inputs, tensors_in
from nm_lightning.compression.structure.plan import apply_plan, plan_sites
from nm_lightning.compression.structure.sites import Site, Trace
from nm_lightning.errors import first_line

UNKNOWN = -1  # one of the sites


def try_out(model: nn.Module, narrow: nn.Module, example: Inputs, facts: Facts, found: Trace) -> None:
    """Narrow a copy of the model at all sites and follow it again; sites where it goes wrong move to `skipped`.

    Args:
        model: the network.
        narrow: a copy in evaluation mode, which is narrowed.
        example: what it reads.
        facts: what following it told.
        found: the sites.
    """
    generator = torch.Generator().manual_seed(0)
    same = components(facts.total + 1, tied_pairs(facts))
    fresh = [narrow]

    def attempt(sites: list[Site]) -> dict[int, str]:
        copy = fresh.pop() if fresh else (without_data if tensors_in(example)[0].is_meta else with_data)(model).eval()
        keeps = {site.name: _some(site, generator) for site in sites}
        apply_plan(copy, plan_sites(sites, keeps))
        return _faults(copy, example, facts, same, *_survivors(facts, sites, keeps))

    while found.sites:
        blamed = _blamed(found.sites, attempt)
        if not blamed:
            return
        for site in [site for site in found.sites if site.name in blamed]:
            found.sites.remove(site)
            found.skipped |= {member.name: blamed[site.name] for member in site.producers}


def _blamed(sites: list[Site], attempt: Callable[[list[Site]], dict[int, str]]) -> dict[str, str]:
    """The sites where a network narrowed at all of them goes wrong; by bisection where the failure does not tell."""
    faults = attempt(sites)
    if UNKNOWN not in faults:
        return {sites[number].name: reason for number, reason in faults.items()}
    if len(sites) == 1:
        return {sites[0].name: faults[UNKNOWN]}
    half = len(sites) // 2
    blamed = _blamed(sites[:half], attempt) | _blamed(sites[half:], attempt)
    return blamed or {site.name: faults[UNKNOWN] for site in sites[half:]}  # they fail together alone


def _survivors(facts: Facts, sites: list[Site], keeps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each neuron of the network, and nobody at the end: whether it stays, and the number of its site."""
    stays = torch.ones(facts.total + 1, dtype=torch.bool)
    home = torch.full((facts.total + 1,), -1)
    for number, site in enumerate(sites):
        for member in [*site.producers, *site.passed]:
            block = facts.blocks.get(member.slots[0][0]) if member.slots else None
            if block is not None:
                home[block] = number
                stays[block] = member.stays(keeps[site.name])
    return stays, home


def _faults(
    narrow: nn.Module, example: Inputs, facts: Facts, same: Tensor, stays: Tensor, home: Tensor
) -> dict[int, str]:
    """The numbers of the sites where the narrow network goes wrong, `UNKNOWN` for any, each with what is wrong."""
    given = {key: block[stays[block]] for key, block in facts.blocks.items()}
    seen = Facts(as_one=facts.as_one, shorter=facts.shorter)
    follower = Follower(narrow, seen, given, facts.members)
    try:
        follower.run(example)
    except Exception as error:  # whatever the user's forward does where its numbers no longer fit
        failed = next((node for node in follower.graph.nodes if node not in follower.origins), None)
        if failed is None:  # the user's code raised between two operations, mostly by a size that it had compared
            touched = [_sites(home[owned(neurons)]) for neurons in _compared(follower)]
            touched = next(filter(None, touched), [UNKNOWN])
            return dict.fromkeys(touched, f"a narrower network fails: {first_line(error)}")
        touched = _sites(home[owned(_neurons_behind(follower, failed))]) or [UNKNOWN]
        return dict.fromkeys(touched, f"a narrower network fails at {failed}: {first_line(error)}")
    faults = {}
    for key, member in facts.members.items():
        if key in seen.members and member.kind != "rows":
            before, after = member.owner, seen.members[key].owner
            if not torch.equal(same[before[stays[before]]], same[after]):
                faults |= dict.fromkeys(_sites(home[owned(before)]), f"{member.name} would read other neurons")
    return faults


def _sites(home: Tensor) -> list[int]:
    """The sites among the homes of neurons."""
    return owned(home.unique()).tolist()


def _compared(follower: Follower) -> Iterator[Tensor]:
    """The neurons whose number was compared, the last first."""
    for size, _, _ in reversed(follower.recorder.compared):
        for neurons, dim in follower.measured(size.node):
            yield along(neurons, dim)


def _neurons_behind(follower: Follower, node: fx.Node) -> Tensor:
    """The neurons that a node's arguments carry, or whose number they are: a size comes from the tensor it measures."""
    found, pending, seen = [torch.empty(0, dtype=torch.long)], list(node.all_input_nodes), set()
    while pending:
        source = pending.pop()
        if source not in seen:
            seen.add(source)
            found.append(neurons_in(follower.origins.get(source)))
            pending += [] if len(found[-1]) else source.all_input_nodes
    return torch.cat(found).unique()


def _some(site: Site, generator: torch.Generator) -> Tensor:
    """A random share of each cell, never the same for all sites, so that no two fit by chance."""
    size = site.width // site.step
    scores, share = torch.rand(site.width, generator=generator), torch.rand(1, generator=generator).item()
    return site.survivors(scores, site.step * min(size - 1, max(1, round(size * (0.25 + 0.6 * share)))))
