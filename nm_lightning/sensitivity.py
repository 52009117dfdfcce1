"""Where a network is sensitive: what each site holds, and what it costs to remove some of it alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from nm_lightning.batches import Key
from nm_lightning.compression import Compressor, Recipe, Widths, cost
from nm_lightning.compression.selection.budgets import sized
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.measure import share_right
from nm_lightning.progress import progress


@dataclass
class Removal:
    """What is left of the network's accuracy without a share of one site: a fraction of the images."""

    ratio: float
    width: int
    accuracy: float


@dataclass
class SiteSensitivity:
    """One site.

    Attributes:
        name: its first layer.
        width: its neurons.
        parameters: share of the network's that goes with them.
        macs: likewise, of the multiply-accumulates.
        removals: what some of it is worth, the smallest first.
    """

    name: str
    width: int
    parameters: float
    macs: float
    removals: list[Removal] = field(default_factory=list)


def held(subject: Subject) -> list[SiteSensitivity]:
    """The sites with what they hold: what goes with one neuron, times their width.

    Weights between two sites are counted at both, so that the shares may add up to more than 1.
    """
    size, full = sized(subject, cost), {site.name: site.width for site in subject.sites}
    whole, found = size(full), []
    for site in subject.sites:
        least = size(full | {site.name: site.step})
        times = site.width / max(1, site.width - site.step)
        parameters = times * (1 - least.parameters / whole.parameters)
        found.append(SiteSensitivity(site.name, site.width, parameters, times * (1 - least.macs / whole.macs)))
    return found


def sensitivity(
    compressor: Compressor,
    recipes: Sequence[Recipe],
    batches: Sequence,
    network: nn.Module,
    keys: tuple[Key, Key] = (None, None),
) -> tuple[float, list[SiteSensitivity], dict[str, str]]:
    """Remove each share of each site, one at a time, and measure what it costs.

    Args:
        compressor: holds the network, which is traced already.
        recipes: one for each ratio, ascending; they differ in nothing else.
        batches: this rank's images and labels, on the device.
        network: the original.
        keys: of images and labels in a batch, where they have no name that is known.

    Returns:
        The original's accuracy on these images, the sites in the order of execution, and those that turned out to be
        no sites, with the reason.
    """
    subject = compressor.subject
    counts = [recipe.budget.counts(subject) for recipe in recipes]

    def accuracy(model: nn.Module) -> float:
        device = next(iter(subject.tensors.values())).device
        return share_right(model, batches, subject.ranks, keys, device)

    before, rows, refused = accuracy(network), {row.name: row for row in held(subject)}, {}
    cells = [(row, recipe, count) for row in rows.values() for recipe, count in zip(recipes, counts, strict=True)]
    known: dict[tuple[str, int], float] = {(row.name, row.width): before for row in rows.values()}
    for row, recipe, count in progress(cells, "removing some of each site alone"):
        width = count[row.name]
        if (row.name, width) not in known and row.name not in refused:
            result = compressor(replace(recipe, budget=Widths({row.name: width}, ratio=0.0)))
            if row.name in result.keep:
                known[row.name, width] = accuracy(result.model)
            else:
                refused[row.name] = result.report.skipped[row.name]
        if row.name not in refused:
            row.removals.append(Removal(recipe.budget.share_removed, width, known[row.name, width]))
    return before, [row for name, row in rows.items() if name not in refused], refused
