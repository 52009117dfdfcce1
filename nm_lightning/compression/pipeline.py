"""The house's one road: trace, select, decompose, fold, report."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nm_lightning.compression import decompose, reference, select
from nm_lightning.compression.fold import Plan, absorb, apply_plan, plan_site, put
from nm_lightning.compression.report import Report, SiteReport
from nm_lightning.compression.trace import Consumer, Site, trace
from nm_lightning.errors import InputError

METHODS = ("prune", "merge")
IMPLEMENTATIONS = ("fast", "reference")


@dataclass(frozen=True)
class Options:
    """How to compress, but for where and how much; see `compress` for each. Raises `InputError` for what can't be."""

    method: str = "merge"
    criterion: str = "l2-norm"
    threshold: float | None = 0.1
    lamda: float = 0.85
    formulation: str = "published"
    implementation: str = "fast"

    def __post_init__(self) -> None:
        for label, choices in (
            ("method", METHODS),
            ("criterion", tuple(select.CRITERIA)),
            ("formulation", decompose.FORMULATIONS),
            ("implementation", IMPLEMENTATIONS),
        ):
            if getattr(self, label) not in choices:
                raise InputError(f"unknown {label} {getattr(self, label)!r}: choose from {', '.join(choices)}")
        for label, value in (("threshold", self.threshold or 0), ("lamda", self.lamda)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"{label} {value!r}: give a number from 0 to 1")


@dataclass
class CompressionResult:
    """A smaller network and how it came about.

    Attributes:
        model: an ordinary network of the original's class, narrower.
        report: what happened at each site.
        plan: the surviving positions of every layer that changed (`fold.apply_plan` repeats the slicing).
    """

    model: nn.Module
    report: Report
    plan: Plan


def compress(
    model: nn.Module,
    example_input: Tensor,
    method: str = "merge",
    criterion: str = "l2-norm",
    ratio: float = 0.5,
    *,
    widths: Sequence[int] | Mapping[str, int] | None = None,
    sites: str | Sequence[str] | None = None,
    threshold: float | None = 0.1,
    lamda: float = 0.85,
    formulation: str = "published",
    implementation: str = "fast",
    rounding: Callable[[int, float], int] = select.floor,
) -> CompressionResult:
    """Make a trained network smaller without data, labels or training.

    Args:
        model: any network that `torch.fx` can trace. It is left as it was.
        example_input: a batch that `model` accepts; only its shape matters.
        method: `prune` drops neurons, `merge` folds each into its most similar survivor (Kim et al., NeurIPS 2020).
        criterion: which neurons stay: `l1-norm`, `l2-norm` or `l2-GM`.
        ratio: share of each site's neurons to remove, in [0, 1).
        widths: the survivors instead: one integer for each site in order, or a mapping from site to integer.
        sites: glob patterns of layer names; None for all.
        threshold: least cosine similarity of a merged pair, in [0, 1]; 0 or None switches the test off.
        lamda: weight of the cosine distance against the bias distance, in [0, 1], where a BatchNorm follows.
        formulation: `published`, `textbook` or `consistent`, see `decompose.merge`.
        implementation: `fast`, or `reference` for the paper's loops.
        rounding: `(neurons, ratio)` to the number of survivors.

    Returns:
        The smaller network, the report and the plan.

    Raises:
        InputError: an argument that names nothing or fits nothing, or a network that can't be traced.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> compress(net, torch.zeros(1, 4), ratio=0.5).model
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    options = Options(method, criterion, threshold, lamda, formulation, implementation)
    select.check_ratio(ratio)
    narrow = copy.deepcopy(model)
    modes = [(module, module.training) for module in narrow.modules()]
    narrow.eval()
    found = trace(narrow, _like(example_input, narrow))
    chosen = select.choose(found.sites, sites)
    counts = select.budget(chosen, ratio, widths, rounding)

    report, plan = Report(skipped=found.skipped), {}
    originals = dict(model.named_modules())  # scaling comes from the original weights, whatever is merged above
    for site in chosen:
        with_bias = not any(consumer.norm for consumer in site.consumers)  # a norm would subtract it again
        scores = select.CRITERIA[criterion](decompose.neuron_vectors(originals[site.name], with_bias))
        keep = select.survivors(scores, counts[site.name])
        row = SiteReport(site.name, site.width, len(keep), method)
        report.sites.append(row)
        if len(keep) < site.width:
            _fold(narrow, site, keep, _scalings(site, keep, originals, options, row), implementation)
            plan_site(plan, site.producer, site.passed, site.consumers, keep)

    apply_plan(narrow, plan)
    for module, training in modes:
        module.training = training
    return CompressionResult(narrow, report, plan)


def _like(example_input: Tensor, model: nn.Module) -> Tensor:
    """The example on the network's device, and in its dtype if it is a floating-point one."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return example_input
    return example_input.to(parameter.device, parameter.dtype if example_input.is_floating_point() else None)


def _fold(narrow: nn.Module, site: Site, keep: Tensor, scalings: list[Tensor], implementation: str) -> None:
    """Give each consumer its columns on the kept neurons, still among the removed ones."""
    multiply = absorb if implementation == "fast" else reference.absorb
    for consumer, scaling in zip(site.consumers, scalings, strict=True):
        weight, positions = narrow.get_submodule(consumer.name).weight.data, consumer.positions()
        put(weight, positions, keep, multiply(weight, positions, scaling))


def _scalings(
    site: Site, keep: Tensor, layers: Mapping[str, nn.Module], options: Options, row: SiteReport
) -> list[Tensor]:
    """The scaling matrix `(n, k)` on the way to each consumer; what happened is noted in `row`.

    Where a scaled neuron would not arrive scaled, merging falls back to pruning.
    """
    pruned = decompose.prune(site.width, keep)
    if options.method == "prune":
        return [pruned] * len(site.consumers)
    merged: dict[str | None, Tensor] = {}  # by norm on the way
    scalings = []
    for consumer in site.consumers:
        obstacle = consumer.obstacle
        if consumer.norm and layers[consumer.norm].running_mean is None:
            obstacle = f"{consumer.norm} keeps no running statistics"
        if obstacle:
            row.note = f"pruned, not merged: {obstacle}"
        elif consumer.norm not in merged:
            merged[consumer.norm] = _merge(site, consumer, keep, layers, options)
        scalings.append(pruned if obstacle else merged[consumer.norm])
    row.merged = max((int((scaling != 0).any(dim=1).sum()) - len(keep) for scaling in merged.values()), default=0)
    row.negative = sum(int((scaling < 0).sum()) for scaling in merged.values())
    return scalings


def _merge(site: Site, consumer: Consumer, keep: Tensor, layers: Mapping[str, nn.Module], options: Options) -> Tensor:
    """Merging's scaling matrix `(n, k)`, by the tensor code or by the paper's loops."""
    producer = layers[site.name]
    threshold, lamda, formulation = options.threshold, options.lamda, options.formulation
    vectors, norm = decompose.neuron_vectors(producer, with_bias=consumer.norm is None), None
    if consumer.norm:
        channels = next(member for member in site.passed if member.name == consumer.norm).positions()[:, 0]
        norm = decompose.norm_parameters(layers[consumer.norm], channels, producer)
    if options.implementation == "fast":
        return decompose.merge(vectors, keep, threshold, norm, lamda, formulation)
    if norm is None:
        return reference.most_similar(vectors, keep, threshold)
    return reference.most_similar_normalised(vectors, keep, threshold, norm, lamda, formulation)
