"""Refit: what makes the neurons is fitted together with what reads them, so that a block says again what it said.

`reconstruct` solves the layers behind the removed neurons; those in front, which make the survivors, stay as they were
trained. Here a whole site is fitted by Gauss-Newton: its producers, the layers on the way and its consumers, against
the original's values where the consumers' outputs join other streams. It needs derivatives of a block's outputs, but no
labels, no rate and no epochs. An approximation: few steps of conjugate gradients, site by site.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph import shapes_of
from nm_lightning.compression.refine.window import End, Window, solvable
from nm_lightning.compression.report import Report
from nm_lightning.compression.settings import Refinement, setting, whole
from nm_lightning.compression.statistics.joins import find_join
from nm_lightning.compression.statistics.predictions import divergence
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.runs import Run, recorded, used_again, without_in_place
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import duplicate, evaluated, plain_copy, with_data
from nm_lightning.compression.structure.inputs import Inputs, first, tensors_in
from nm_lightning.compression.structure.operations import CONVOLUTIONS
from nm_lightning.compression.structure.plan import Plan, replace_tensors
from nm_lightning.compression.structure.sites import Site
from nm_lightning.errors import InputError
from nm_lightning.progress import progress

ENOUGH = 128  # values at the ends for each free parameter; further images are not looked at,
FEWEST = 256  # but so many always are
CURVED = 128  # of these say how the loss is curved, or as many as give ENOUGH values; all say which way it falls


@dataclass(frozen=True)
class Refit(Refinement):
    """Fits each site's layers together to the original."""

    name, turn = "refit", 1
    rounds: int = setting(
        1,
        "rounds of least squares for each site's layers together, after any method, no labels; 2 to 4 help",
        whole(0, "rounds"),
        flag="refit",
        off=0,
    )
    horizon: int = setting(
        0,
        "how many of the next sites' outputs refit compares, too, at each site; 3 is slower and nearer",
        whole(0, "sites"),
        flag="refit_horizon",
    )

    def refine(self, subject: Subject, narrow: nn.Module, plan: Plan, report: Report) -> dict[str, Tensor]:
        """The fitted parameters, if the predictions on the last quarter of the images come nearer to the original's.

        The sites' errors and what was left alone go to the report.
        """
        original, _ = plain_copy(subject.model)
        shrunk = [site for site in subject.sites if report.widths[site.name] < site.width]
        values, errors, refused = refit(
            original, narrow, shrunk, plan, subject.batches, self.rounds, subject.ranks, self.horizon
        )
        fitted = duplicate(narrow)
        replace_tensors(fitted, values)
        try:
            before, after = (divergence(each, subject) for each in (narrow, fitted))
        except InputError:  # no predictions
            before = after = 0.0
        if not after <= before:
            report.remarks.append(f"refit left away: {after:.3g} nats an image from the original, {before:.3g} without")
            return {}
        for row in report.sites:
            row.error = errors.get(row.name, row.error)
        report.remarks += [f"{name}: not refit together: {reason}" for name, reason in refused.items()]
        return values


@torch.no_grad()
def refit(
    original: nn.Module,
    narrow: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    batches: Sequence[Inputs],
    rounds: int = 1,
    ranks: Ranks = ALONE,
    horizon: int = 0,
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """Fit each site's layers to the original, in the order of execution.

    Args:
        original: the network as it was; it is only read.
        narrow: the compressed network, by whatever method; it is only read.
        sites: those that shrank.
        plan: what stayed.
        batches: inputs as the network is called with.
        rounds: of Gauss-Newton at each site.
        ranks: that each have a share of the images.
        horizon: of how many problems that follow the ends count, too (after SNOWS, arXiv 2411.18376).

    Returns:
        The narrow network's parameters by name; by site, the share of the original's energy at its ends that is still
        missing, where what a rectifier cuts off does not count; and by site the reason why it was left as it is.
    """
    original, fitted = evaluated(original), with_data(evaluated(narrow))
    graph, batches = recorded(original, batches)
    narrow_graph, batches = recorded(fitted, batches)
    graphs = [graph, narrow_graph]
    names = [{node.name for node in graph.nodes} for graph in graphs]
    if names[0] != names[1]:
        return {}, {}, {site.name: "the narrow network's graph differs from the original's" for site in sites}
    for graph, network in zip(graphs, (original, fitted), strict=True):
        without_in_place(graph, network)
    wanted, found = (Run(network, graph, batches) for network, graph in zip((original, fitted), graphs, strict=True))
    windows, refused = find_windows(sites, plan, wanted, found, ranks.first(len(tensors_in(batches[0])[0])))
    if horizon:
        look_ahead([window for _, window in windows], horizon, ranks.images(batches), found)
    errors = {}
    for name, window in progress(windows, "refitting"):
        errors[name] = window.solve(rounds, ranks)
    errors = {site.name: errors[site.name] for site in sites if site.name not in refused}
    return dict(fitted.named_parameters()), errors, refused


def find_windows(
    sites: Sequence[Site], plan: Plan, wanted: Run, found: Run, length: int
) -> tuple[list[tuple[str, Window]], dict[str, str]]:
    """The problems by name, in the order of execution: a site's layers, and each layer alone that reads what they make.

    Also returned are the sites that are left alone, with the reason. `length` is that of a full batch.
    """
    network = found.module
    names = {node.name: node for node in found.nodes}
    originals = {node.name: node for node in wanted.nodes}
    shapes = shapes_of(found.graph)
    values = few_values(found)
    called = {node.target for node in found.nodes if node.op == "call_module"}
    again = used_again(found.graph, network)

    def window(start: fx.Node, readers: Sequence[fx.Node], layers: Iterable[str]) -> Window:
        ends = {}
        for node in readers:
            join = find_join(node, network, set(), shapes, again)
            rows = [stays for dim, _, stays in plan["slices"].get(f"{node.target}.weight", []) if dim == 0]
            stays = torch.tensor(rows[0], device=tensors_in(found.batches[0])[0].device) if rows else None
            axis = 1 if isinstance(network.get_submodule(node.target), CONVOLUTIONS) else -1
            ends[join.end] = End(join.end, originals[join.end.name], axis, stays, join.limit)
        free = {name: network.get_submodule(name) for name in layers}
        parameters = sum(own.numel() for layer in free.values() for own in layer.parameters(recurse=False))
        images = ENOUGH * parameters // sum(shapes[end][1:].numel() for end in ends)
        counts = (-(-max(images, least) // length) for least in (FEWEST, CURVED))
        return Window(wanted, found, start, originals[start.name], list(ends.values()), free, *counts)

    windows, refused = {}, {}
    for site in sites:
        layers = dict.fromkeys(member.name for member in (*site.producers, *site.passed, *site.consumers))
        layers = [name for name in layers if name in called]
        repeated = next((name for name in layers if name in again), None)
        consumers = [own for own in site.consumers if own.node in names or own.name in called]  # others only train
        readers = [names.get(consumer.node) for consumer in consumers]
        makers = [node for node in found.nodes if node.target in {member.name for member in site.producers}]
        if site.coupled:
            refused[site.name] = "its layers make a residual stream together"
        elif not readers or not all(node is not None and solvable(node, network) for node in readers):
            refused[site.name] = "a layer that reads it is no Linear or convolution of its own"
        elif not makers:
            refused[site.name] = "no layer of its own makes it"
        elif repeated:
            refused[site.name] = f"{repeated} or its weight is used several times"
        else:
            windows[site.name] = window(makers[0], readers, layers)
            obstacle = windows[site.name].obstacle(values)
            if obstacle:
                refused[site.name] = obstacle
                del windows[site.name]
    fitted = {name for own in windows.values() for name in own.layers}
    turned = {name for site in sites for pair in site.pairs for name in (pair.maker, *[pair.other][pair.dim :])}
    changed = set()
    for node in found.nodes:
        if node.target in fitted or any(source in changed for source in node.all_input_nodes):
            changed.add(node)
            if solvable(node, network) and node.target not in fitted | again | turned:  # these make others' rows now
                alone = window(node, [node], [node.target])
                if getattr(alone.layers[node.target], "groups", 1) == 1 and not alone.obstacle(values):
                    windows[node.target] = alone
    return sorted(windows.items(), key=lambda item: found.position[item[1].start]), refused


def few_values(run: Run) -> dict[fx.Node, Any]:
    """All nodes' values for as many images as the graph was recorded with."""
    few = shapes_of(run.graph)[run.nodes[0]][:1].numel()
    return Run(run.module, run.graph, [first(run.batches[0], few)]).first_values()


def look_ahead(windows: Sequence[Window], horizon: int, images: int, found: Run) -> None:
    """Let ends of so many problems that follow count, in place, where they say enough and can be differentiated.

    Of an end with few values for each free parameter, as logits are, the problem would learn the noise.
    """
    own, values = [window.ends for window in windows], few_values(found)
    for number, window in enumerate(windows):
        behind, parameters = reached(window.start), sum(each.numel() for each in window.free.values())
        ends = [
            end
            for ends in own[number + 1 : number + 1 + horizon]
            for end in ends
            if end.node in behind and values[end.node][0].numel() * images >= ENOUGH * parameters
        ]
        if ends:
            window.compare([*own[number], *ends])
            if window.obstacle(values):
                window.compare(own[number])


def reached(start: fx.Node) -> set[fx.Node]:
    """All that follows from a node, and the node."""
    found, ahead = {start}, [start]
    while ahead:
        new = [user for user in ahead.pop().users if user not in found]
        found |= {*new}
        ahead += new
    return found
