"""Find the sites of a network: the sets of hidden neurons that can shrink together."""

import copy
import traceback
from collections.abc import Set

import torch
from torch import nn

from nm_lightning.compression.graph.attention import find_pairs, modules_with_heads, turned
from nm_lightning.compression.graph.collect import collect
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.frames import HERE, TORCH
from nm_lightning.compression.graph.neurons import Facts, groups_as_one, owned
from nm_lightning.compression.graph.trial import try_out
from nm_lightning.compression.structure.copies import check_network, with_data, without_data
from nm_lightning.compression.structure.inputs import Inputs, check_inputs, first, like, repeated, shapes, tensors_in
from nm_lightning.compression.structure.sites import Trace
from nm_lightning.errors import InputError, first_line

SCOPES = ("hidden", "all")
ATTENTION = ("heads", "dimensions")


def trace(model: nn.Module, example_input: Inputs, scope: str = "hidden", attention: str = "heads") -> Trace:
    """Find every site of a network.

    Args:
        model: any network whose code is decided by shapes and settings; its weights are only read.
        example_input: a batch that `model` accepts: a tensor, a tuple of inputs, or a dictionary of inputs by name.
            Only shapes and dtypes matter.
        scope: `hidden` for neurons inside a block, `all` for residual streams too.
        attention: `heads` for fewer of them; `dimensions` for shorter ones where they can be turned, see `Pair`. A
            single head gets shorter either way.

    Returns:
        The sites, and the layers that can't be compressed with the reason why.

    Raises:
        InputError: the network decides by values of activations, or does not accept the example.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(site.name, site.width, [c.name for c in site.consumers]) for site in trace(net, torch.zeros(1, 4)).sites]
    [('0', 8, ['2'])]
    """
    if scope not in SCOPES:
        raise InputError(f"unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
    if attention not in ATTENTION:
        raise InputError(f"unknown attention {attention!r}: choose from {', '.join(ATTENTION)}")
    check_inputs(example_input)
    check_network(model)
    found, facts, shorter = _find(model, example_input, scope, frozenset())
    shorter = modules_with_heads(facts, alone=attention == "heads")
    while shorter:
        other, _, turned = _find(model, example_input, scope, shorter)
        if turned == shorter:
            return other
        shorter = shorter & turned
    return found


def _find(model: nn.Module, example_input: Inputs, scope: str, shorter: Set[str]) -> tuple[Trace, Facts, Set[str]]:
    """What is found if the heads of some modules get shorter, and those of them where that works."""
    hollow, example, facts, followers = _attempt(model, example_input, shorter)
    seen = {tensor for member in facts.members.values() for tensor, _ in member.slots}
    if any(name not in seen for name, _ in hollow.named_parameters()):  # auxiliary heads exist only in training
        try:
            more = facts.copy()
            count = max(2, len(tensors_in(example)[0]))
            followers.append(_follow(hollow.train(), repeated(example, count), more))
            facts = more
        except InputError:
            pass  # the network as it is evaluated is known
        hollow.eval()
    _check_own_forwards(model, facts)
    for member in facts.members.values():
        read = [tensor for tensor, _ in member.slots if tensor in facts.bare - facts.parameters]
        if read:
            facts.frozen.append((owned(member.owner), f"{read[0]} is also read outside its layer"))
    found = collect(facts, followers, find_pairs(followers[0], facts))
    try_out(model, hollow, example, facts, found)
    if scope == "hidden":
        _leave_coupled(found)
    pairs = [pair for site in found.sites for pair in site.pairs if not site.coupled or len(pair.neurons) == 1]
    return found, facts, turned(pairs, facts, followers[0])


def _attempt(model: nn.Module, given: Inputs, shorter: Set[str]) -> tuple[nn.Module, Inputs, Facts, list[Follower]]:
    """The first way to run the network that works, and what following it told: without data, on two images.

    What depends on the data of a buffer runs with data; what reads its images in groups runs on all that were given.
    """
    refusal = None
    for make in (without_data, with_data):
        hollow = make(model).eval()
        for example in (first(given, 2), given):
            facts, example = Facts(shorter=shorter), like(example, hollow)
            try:
                follower = _follow(hollow, example, facts)
                while groups := groups_as_one(facts):  # which those before them did not know yet
                    facts = Facts(as_one=facts.as_one | groups, shorter=shorter)
                    follower = _follow(hollow, example, facts)
                return hollow, example, facts, [follower]
            except InputError as error:
                refusal = error
    if isinstance(refusal, Rejected):
        raise InputError(f"{type(model).__name__} rejects an input of shape {shapes(given)}: {refusal}") from refusal
    raise refusal


class Rejected(InputError):
    """The network's own code fails."""


def _follow(hollow: nn.Module, example: Inputs, facts: Facts) -> Follower:
    follower = Follower(hollow, facts)
    try:
        follower.run(example)
    except InputError:
        raise
    except Exception as error:  # whatever the user's forward raises, or a rule
        if follower.failed:
            raise Rejected(f"{first_line(error)}{_users_line(error)}") from error
        raise InputError(f"{type(hollow).__name__} can't be followed: {first_line(error)}") from error
    return follower


def _users_line(error: Exception) -> str:
    """Where in the user's code an error arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((TORCH, HERE))]
    return f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _check_own_forwards(model: nn.Module, facts: Facts) -> None:
    """Freeze what a subclass reads whose forward is not linear in its weight, as one that standardises it."""
    for name, shape in facts.shapes.items():
        member = facts.members[name, "columns"]
        layer = copy.deepcopy(model.get_submodule(name)).eval()
        weight, dim = layer.weight.data, member.slots[0][1]
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
            facts.frozen.append((owned(member.owner), reason))


def _leave_coupled(found: Trace) -> None:
    """Sites along residual streams are not within the scope `hidden`."""
    for site in [site for site in found.sites if site.coupled]:
        names = [member.name for member in site.producers]
        for name in names:
            others = [other for other in names if other != name]
            listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            found.skipped[name] = f"added to the neurons of {listed or name}: --scope all shrinks them"
        found.sites.remove(site)
