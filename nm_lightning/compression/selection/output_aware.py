"""The criterion `output`: which neurons the next layers can do without, once they are solved for the others.

Backward elimination on the statistics of what each consumer reads: starting from all neurons, drop the one whose
columns cost least, `tr(W_j^T [(G^-1)_jj]^-1 W_j)` with `W` the present least-squares solution, and update `G^-1` and
`W` by the Schur complement. Outputs are weighted by the Fisher information of the network's own predictions, so that
a cost is in nats, and sites can be compared. Sites are taken backwards: outputs that go do not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression.selection.criteria import L2Norm
from nm_lightning.compression.settings import Criterion, Method
from nm_lightning.compression.statistics.patches import factorise, read_patches, ridge_of
from nm_lightning.compression.statistics.predictions import check_logits, divergence
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import narrow
from nm_lightning.compression.structure.inputs import (
    Inputs,
    call,
    differentiable,
    length,
    split,
    tensors_in,
)
from nm_lightning.compression.structure.operations import CONVOLUTIONS, SOLVABLE
from nm_lightning.compression.structure.sites import Consumer, Site
from nm_lightning.errors import InputError
from nm_lightning.progress import progress

SURE = (
    2 / 3
)  # of the divergence on drawn images: 0.76 to 0.9 on ResNet-20 and -56 at 0.5, where `output` is a point worse
WIDE = 1200  # columns, with all taps, above which a convolution's taps are taken to be alike


@dataclass(frozen=True)
class OutputAware(Criterion):
    """Those stay without which the next layers, once they are solved, lose most; by calibration images.

    Where a consumer can't be solved, or where the choice by norm predicts held-out images better, that one is taken.
    """

    name = "output"
    looks = True

    def choose(self, subject: Subject, counts: Mapping[str, int], method: Method) -> dict[str, Tensor]:
        """By backward elimination, see `choose_by_output`."""
        ranks, fallback = subject.ranks, L2Norm()
        by_norm = fallback.choose(subject, counts, method)
        by_output = ranks.first(by_norm | choose_by_output(subject.sites, counts, watched(subject)))
        if not method.looks:
            return by_output
        choices = {self.name: by_output, fallback.name: by_norm}
        return choices[closest(choices, subject, method, "criterion")]


@dataclass(frozen=True)
class Auto(L2Norm):
    """Those of `l2-norm`; of `output` where a method that looks at images would end far from the original by them."""

    name = "auto"


def watched(subject: Subject) -> dict[str, "Watch"]:
    """What `watch` sees of a subject, once for all cells of a grid."""
    key = ("watch", *(site.name for site in subject.sites))
    return subject.once(
        key, lambda: watch(subject.evaluated, subject.sites, subject.batches, subject.seed, subject.ranks)
    )


@torch.no_grad()
def closest(choices: Mapping[str, Mapping[str, Tensor]], subject: Subject, method: Method, what: str) -> str:
    """The choice of survivors that changes the predictions on held-out images least; the first of equals.

    The measure is the Kullback-Leibler divergence from the original's predictions, so no label is read. The subject's
    remarks say what each would have cost. On images that a program draws the last choice is taken unless another one's
    divergence is below `SURE` of its: there a little is misleading.

    Args:
        choices: by name, the survivors `(k,)` of each site; the last one looked at no predictions.
        subject: its first images are what `method` sees, as many of its last ones are held out.
        method: what becomes of the others.
        what: is chosen, for the remark.
    """
    batches = subject.batches
    if len(batches) == 1:
        batches = split(batches[0], (length(batches[0]) + 1) // 2)
    half = max(1, len(batches) // 4)
    seen, held_out = subject.on(batches[:half]), batches[-half:]
    lost: dict[str, float] = {}
    for name, keeps in choices.items():
        small, _ = narrow(subject.model, subject.sites, method.decompose(seen, keeps))
        lost[name] = divergence(small, subject, held_out)
    best, plain = min(lost, key=lambda name: (lost[name] != lost[name], lost[name])), [*lost][-1]  # no number: last
    each, why = ", ".join(f"{name} {value:.3g}" for name, value in lost.items()), "nearest to the original"
    if subject.calibration.drawn and best != plain and lost[best] > SURE * lost[plain]:
        best, why = plain, f"{best} is little nearer to the original"
    subject.remarks.append(f"{what} {best}: {why} on held-out images ({each} nats an image)")
    return best


class Watch:
    """Sums over the images at one consumer: its inputs' Gram matrix and its outputs' Fisher information.

    Args:
        layer: the consumer, not grouped.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.columns = layer.weight.shape[1]
        self.taps = layer.weight[0, 0].numel()
        self.alike = self.taps > 1 and self.columns * self.taps > WIDE
        self.gram: Tensor | float = 0.0
        self.fisher: Tensor | float = 0.0
        self.images = 0
        self.handles = [
            layer.register_forward_pre_hook(self.read, with_kwargs=True),
            layer.register_forward_hook(self.write),
        ]

    def read(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Add what the layer reads."""
        images = args[0] if args else kwargs["input"]
        with torch.no_grad():
            if self.alike:
                patches = images.movedim(1, -1).flatten(0, -2)
                patches = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)
            else:
                every = torch.ones(self.columns, dtype=torch.bool)
                (patches,) = read_patches(layer, images, every)
            self.gram = self.gram + (patches.T @ patches).double()
            self.images += len(images)

    def write(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        """Add the squared gradient at the output when it comes."""
        dim = 1 if isinstance(layer, CONVOLUTIONS) else output.ndim - 1
        others = [other for other in range(output.ndim) if other != dim]

        def add(gradient: Tensor) -> None:
            self.fisher = self.fisher + gradient.double().square().sum(others)

        output.register_hook(add)

    def problem(self, consumer: Consumer, counts: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of the Gram matrix, the weight, and each neuron's rows in both; outputs `(out,)` that count."""
        positions = max(1, int(self.gram[-1, -1]) // max(1, self.images))
        scale = (self.fisher / (self.images * positions)).sqrt().to(self.gram) * counts.to(self.gram)
        weight = self.layer.weight.detach().to(self.gram)
        weight = weight.reshape(*weight.shape[:2], -1) * scale[:, None, None]  # (out, columns, taps)
        rows = consumer.positions().to(weight.device)
        if self.alike:
            weight = weight.transpose(0, 1).flatten(1)
        else:
            weight = weight.permute(2, 1, 0).flatten(0, 1)
            rows = (rows[:, None, :] + self.columns * torch.arange(self.taps, device=rows.device)[:, None]).flatten(1)
        weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        gram = self.gram[None]
        (inverse,) = torch.cholesky_inverse(factorise(gram, ridge_of(gram, ridge)))
        return inverse * self.images, weight, rows


def eliminate(problems: Sequence[tuple[Tensor, Tensor, Tensor]], width: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which neurons go.

    Args:
        problems: for each consumer the inverse Gram matrix `(p, p)` per image, the weight `(p, out)`, and the rows
            `(n, s)` of each neuron. They are changed in place.
        width: how many stay.
        cells: `(n,)`; the same share of each stays.

    Returns:
        The step `(n,)` at which each neuron goes, `n` for those that stay, and the cost of each step.
    """
    count, left = len(cells), torch.bincount(cells)
    gone_at, costs, quota = torch.full((count,), count), [], (left * width // count)[cells]
    for step in range(count - width):
        cost, solved = 0.0, []
        gone = gone_at < count
        for inverse, weight, rows in problems:
            blocks = inverse[rows[:, :, None], rows[:, None, :]]
            blocks[gone] = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
            own = weight[rows]
            solution = torch.linalg.solve(blocks, own)
            cost = cost + (own * solution).sum(dim=(1, 2))
            solved.append((blocks, solution))
        cost = cost.cpu().masked_fill(gone | (left[cells] <= quota), torch.inf)
        neuron = int(cost.argmin())
        costs.append(cost[neuron])
        gone_at[neuron] = step
        left[cells[neuron]] -= 1
        for (inverse, weight, rows), (blocks, solution) in zip(problems, solved, strict=True):
            columns = inverse[:, rows[neuron]]
            weight -= columns @ solution[neuron]
            inverse -= columns @ torch.linalg.solve(blocks[neuron], columns.T)
    return gone_at, torch.stack(costs) if costs else torch.zeros(0)


def watch(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Inputs], seed: int = 0, ranks: Ranks = ALONE
) -> dict[str, Watch]:
    """Run all ranks' images through the network, and their labels' gradients back; by consumer, what was summed.

    Sites with a consumer that can't be solved have no entries. The labels are drawn from the network's predictions.
    """
    layers = dict(model.named_modules())
    fit = [
        site for site in sites if site.consumers and all(_fits(site, consumer, layers) for consumer in site.consumers)
    ]
    watches = {consumer.name: Watch(layers[consumer.name]) for site in fit for consumer in site.consumers}
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = tensors_in(batches[0])[0].device
    try:
        if not any(tensor.is_floating_point() for tensor in tensors_in(batches[0])):
            raise InputError("criterion output and targets need gradients, the network's inputs are whole numbers")
        for parameter in wanting:
            parameter.requires_grad_(False)
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in progress(batches, "selecting"):
                logits = check_logits(call(model, differentiable(batch))).float()
                drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
                F.cross_entropy(logits.flatten(0, -2), drawn.flatten(), reduction="sum").backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"criterion output and targets need a network that can be differentiated: {reason}") from error
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for each in watches.values():
            for handle in each.handles:
                handle.remove()
    for each in watches.values():
        images = torch.tensor(each.images, device=device)
        each.gram, each.fisher, images = ranks.total(each.gram, each.fisher, images)
        each.images = int(images)
    return watches


def choose_by_output(
    sites: Sequence[Site], counts: Mapping[str, int], watches: Mapping[str, Watch], ridge: float = 1e-3
) -> dict[str, Tensor]:
    """The survivors `(k,)` of each site whose consumers were watched; other sites are left out.

    Args:
        sites: the sites.
        counts: by site, how many stay.
        watches: by consumer, as `watch` returns them.
        ridge: as a share of the Gram matrix' mean diagonal.
    """
    keeps, counting = {}, {name: torch.ones(len(each.layer.weight)) for name, each in watches.items()}
    for site in reversed(sites):
        if site.consumers and all(consumer.name in watches for consumer in site.consumers):
            gone_at, _ = eliminate(_problems(site, watches, counting, ridge), counts[site.name], site.cells)
            keeps[site.name] = site.survivors(gone_at.double(), counts[site.name])
            for member in site.producers:
                if member.name in counting:
                    counting[member.name] *= member.stays(keeps[site.name])
    return keeps


def costs_of(sites: Sequence[Site], watches: Mapping[str, Watch], ridge: float = 1e-3) -> dict[str, Tensor]:
    """What removing one more neuron costs, down to the last: `(n - step,)` in nats of an image's predictions.

    A second-order estimate, each site for itself. Sites that were not watched are left out.
    """
    costs, counting = {}, {name: torch.ones(len(each.layer.weight)) for name, each in watches.items()}
    for site in sites:
        if site.consumers and all(consumer.name in watches for consumer in site.consumers):
            _, each = eliminate(_problems(site, watches, counting, ridge), site.step, site.cells)
            costs[site.name] = each.double() / 2
    return costs


def _problems(
    site: Site, watches: Mapping[str, Watch], counting: Mapping[str, Tensor], ridge: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [watches[consumer.name].problem(consumer, counting[consumer.name], ridge) for consumer in site.consumers]


def _fits(site: Site, consumer: Consumer, layers: Mapping[str, nn.Module]) -> bool:
    layer = layers.get(consumer.name)
    return isinstance(layer, SOLVABLE) and consumer.groups == 1 and consumer.even(site.width)
