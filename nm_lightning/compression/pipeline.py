"""The house's one road: trace, select, decompose, fold, report."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression import decompose, reference, select
from nm_lightning.compression.calibration import batches_of, recalibrate_norms
from nm_lightning.compression.fold import Fold, Plan, absorb, apply_plan, named_tensors, plan_sites
from nm_lightning.compression.output_aware import choose_by_output
from nm_lightning.compression.prepare import evaluated, own_tensors, plain_copy, unwrapped
from nm_lightning.compression.reconstruct import reconstruct
from nm_lightning.compression.report import Report, SiteReport
from nm_lightning.compression.sites import Consumer, Site
from nm_lightning.compression.trace import trace
from nm_lightning.errors import InputError

METHODS = ("prune", "merge", "reconstruct")
OUTPUT = "output"
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
    ridge: float = 1e-3

    @property
    def fallback(self) -> str:
        """The criterion where `output` can't decide."""
        return "l2-norm" if self.criterion == OUTPUT else self.criterion

    @property
    def looks(self) -> bool:
        """Whether it needs calibration images."""
        return self.method == "reconstruct" or self.criterion == OUTPUT

    def __post_init__(self) -> None:
        for label, choices in (
            ("method", METHODS),
            ("criterion", (*select.CRITERIA, OUTPUT)),
            ("formulation", decompose.FORMULATIONS),
            ("implementation", IMPLEMENTATIONS),
        ):
            if getattr(self, label) not in choices:
                raise InputError(f"unknown {label} {getattr(self, label)!r}: choose from {', '.join(choices)}")
        for label, value in (("threshold", self.threshold or 0), ("lamda", self.lamda)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"{label} {value!r}: give a number from 0 to 1")
        if (
            isinstance(self.ridge, bool)
            or not isinstance(self.ridge, (int, float))
            or not 0 <= self.ridge < float("inf")
        ):
            raise InputError(f"ridge {self.ridge!r}: give a number from 0")


@dataclass
class CompressionResult:
    """A smaller network and how it came about.

    Attributes:
        model: an ordinary network of the original's class, narrower.
        report: what happened at each site.
        plan: the surviving positions of every tensor that changed (`apply_plan` repeats the slicing).
        keep: by site, the indices of the neurons that stayed.
    """

    model: nn.Module
    report: Report
    plan: Plan
    keep: dict[str, Tensor]


def compress(
    model: nn.Module,
    example_input: Tensor,
    method: str = "merge",
    criterion: str = "l2-norm",
    ratio: float = 0.5,
    *,
    widths: Sequence[int] | Mapping[str, int] | None = None,
    sites: str | Sequence[str] | None = None,
    scope: str = "hidden",
    threshold: float | None = 0.1,
    lamda: float = 0.85,
    formulation: str = "published",
    implementation: str = "fast",
    rounding: Callable[[int, float], int] = select.floor,
    calibration: Tensor | Iterable | str | None = None,
    calibration_size: int = 1024,
    ridge: float = 1e-3,
    recalibrate_norm: bool = False,
    seed: int = 0,
) -> CompressionResult:
    """Make a trained network smaller without labels or training; prune and merge need no images either.

    Args:
        model: any network that `torch.fx` can trace, also inside DDP or `torch.compile`. It is left as it was.
        example_input: a batch that `model` accepts; only its shape and dtype matter.
        method: `prune` drops neurons, `merge` folds each into its most similar survivor (Kim et al., NeurIPS 2020),
            `reconstruct` solves the layers behind by least squares on calibration images, see `reconstruct`.
        criterion: which neurons stay: `l1-norm`, `l2-norm`, `l2-GM`, or `output` by calibration images, see
            `output_aware`.
        ratio: share of each site's neurons to remove, in [0, 1).
        widths: the survivors instead: one integer for each site in order, or a mapping from site to integer.
        sites: glob patterns of layer names; None for all.
        scope: `hidden` for neurons inside a block, `all` for those of residual streams too.
        threshold: least cosine similarity of a merged pair, in [0, 1]; 0 or None switches the test off.
        lamda: weight of the cosine distance against the bias distance, in [0, 1], where a BatchNorm follows.
        formulation: `published`, `textbook` or `consistent`, see `decompose.merge`.
        implementation: `fast`, or `reference` for the paper's loops.
        rounding: `(neurons, ratio)` to the number of survivors.
        calibration: unlabelled images as the network reads them: a tensor `(N, ...)`, a DataLoader, or `synthetic`
            for images that a program draws. Needed by `reconstruct`, `output` and `recalibrate_norm`.
        calibration_size: how many of them at most.
        ridge: of the least squares, as a share of the mean diagonal of a layer's Gram matrix.
        recalibrate_norm: estimate BatchNorm statistics anew at the end.
        seed: of what is drawn: the synthetic images, and the Fisher information's labels.

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
    options = Options(method, criterion, threshold, lamda, formulation, implementation, ridge)
    select.check_ratio(ratio)
    if not isinstance(example_input, Tensor):
        raise InputError(f"example_input is a {type(example_input).__name__}: give one tensor, a batch of images")
    model = unwrapped(model)
    narrow, notes = plain_copy(model)
    originals = named_tensors(narrow)
    found = trace(narrow, example_input, scope)
    chosen = select.choose(found.sites, sites)
    counts = select.budget(chosen, ratio, widths, rounding)

    batches = []
    if options.looks or recalibrate_norm:
        if calibration is None:
            what = "method reconstruct" if method == "reconstruct" else "criterion output"
            what = what if options.looks else "recalibrate_norm"
            raise InputError(f"{what} looks at images: give calibration, a tensor, a DataLoader or 'synthetic'")
        batches = batches_of(calibration, example_input, calibration_size, seed)
    report, folds = Report(skipped=found.skipped, remarks=notes), defaultdict(list)
    layers = dict(narrow.named_modules())
    keeps = {
        site.name: select.keep_of(site, _scores(site, originals, options.fallback).cpu(), counts[site.name])
        for site in chosen
    }
    if criterion == OUTPUT:
        by_output = keeps | choose_by_output(evaluated(narrow), chosen, counts, batches, seed=seed)
        if method != "reconstruct" or _wins(by_output, keeps, narrow, chosen, batches, ridge):
            keeps = by_output
        else:
            report.remarks.append(f"output: {options.fallback} chose better on images that were held out")
    for site in chosen:
        keep = keeps[site.name]
        row = SiteReport(site.name, site.width, len(keep), method)
        report.sites.append(row)
        if len(keep) < site.width and method == "merge":
            scalings = _scalings(site, keep, originals, layers, options, row)
            multiply = absorb if implementation == "fast" else reference.absorb
            for consumer, scaling in zip(site.consumers, scalings, strict=True):
                if scaling is not None:
                    folds[consumer.slots[0][0]].append(Fold(consumer, keep, scaling, multiply))

    plan = plan_sites(chosen, keeps)
    if method == "reconstruct":
        errors, refused = {}, {}
        narrow, plan = _reconstructed(narrow, plan, chosen, keeps, batches, ridge, errors, refused)
        for site, row in zip(chosen, report.sites, strict=True):
            names = [consumer.name for consumer in site.consumers]
            row.error = max((errors[name] for name in names if name in errors), default=None)
            reasons = [refused[name] for name in names if name in refused]
            if reasons and len(keeps[site.name]) < site.width:
                row.note = f"pruned, not reconstructed: {reasons[0]}"
    else:
        apply_plan(narrow, plan, folds)
        own_tensors(narrow, originals)
    if recalibrate_norm:
        recalibrate_norms(narrow, (images.to(example_input.dtype) for images in batches))
    return CompressionResult(narrow, report, plan, keeps)


def _reconstructed(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    keeps: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    ridge: float,
    errors: dict[str, float],
    refused: dict[str, str],
) -> tuple[nn.Module, Plan]:
    """A narrow copy, and the plan with the biases that were made; `errors` and `refused` are filled."""
    original = evaluated(model)
    narrow = copy.deepcopy(original)
    for found, told in zip((errors, refused), reconstruct(original, narrow, sites, keeps, batches, ridge), strict=True):
        found |= told
    made = {}
    for name, layer in narrow.named_modules():
        if getattr(layer, "bias", None) is not None and getattr(original.get_submodule(name), "bias", None) is None:
            made[name], layer.bias = layer.bias.detach(), None
    lengths = {}
    for name, bias in made.items():
        steps = plan["slices"].get(f"{name}.weight", [])
        rows = next((stays for dim, _, stays in steps if dim == 0), range(len(bias)))
        made[name] = bias[list(rows)]
        lengths[name] = len(made[name])
    plan = plan | ({"biases": lengths} if lengths else {})
    apply_plan(narrow, plan)
    for name, bias in made.items():
        narrow.get_submodule(name).bias.data.copy_(bias)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    for name, tensor in named_tensors(narrow).items():
        tensor.data = tensor.data.to(dtypes.get(name, dtypes.get(f"{name.removesuffix('bias')}weight", tensor.dtype)))
    for layer, before in zip(narrow.modules(), model.modules(), strict=True):
        layer.training = before.training
    return narrow, plan


def _wins(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    ridge: float,
) -> bool:
    """Whether the first choice of survivors leaves the network's predictions less changed, on held-out images."""
    half = max(1, len(batches) // 4)
    seen, held_out = batches[:half], batches[-half:]
    original, divergences = evaluated(model), []
    for keeps in (first, second):
        narrow, _ = _reconstructed(model, plan_sites(sites, keeps), sites, keeps, seen, ridge, {}, {})
        narrow.float().eval()
        with torch.no_grad():
            pairs = [(narrow(images).log_softmax(-1), original(images).log_softmax(-1)) for images in held_out]
        divergences.append(sum(F.kl_div(*pair, reduction="sum", log_target=True) for pair in pairs))
    return bool(divergences[0] <= divergences[1])


def _scores(site: Site, tensors: Mapping[str, Tensor], criterion: str) -> Tensor:
    """How much each neuron should stay, `(n,)`; where several layers are added, each has an equal say."""
    score = select.CRITERIA[criterion]
    with_bias = not any(consumer.norm for consumer in site.consumers)  # a norm would subtract it again
    if not site.coupled and site.producers[0].even(site.width):
        return score(decompose.neuron_vectors(site.producers[0], tensors, with_bias))
    total = torch.zeros(site.width)
    for producer in site.producers:
        rows = torch.arange(len(producer.owner))
        each = score(decompose.neuron_vectors(replace(producer, owner=rows), tensors, with_bias)).cpu().float()
        owned = producer.owner >= 0
        total.index_add_(0, producer.owner[owned], each[owned] / each.mean().clamp(min=1e-30))
    return total


def _scalings(
    site: Site,
    keep: Tensor,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    options: Options,
    row: SiteReport,
) -> list[Tensor | None]:
    """Merging's matrix `(n, k)` on the way to each consumer, None where it is pruned; what happened goes to `row`.

    Where a scaled neuron would not arrive scaled, merging falls back to pruning.
    """
    merged: dict[tuple, Tensor] = {}
    scalings: list[Tensor | None] = []
    for consumer in site.consumers:
        obstacle = consumer.obstacle
        if len(site.producers) > 1:
            obstacle = obstacle or f"{', '.join(member.name for member in site.producers)} make it together"
        elif not all(member.even(site.width) for member in [site.producers[0], *site.passed, *site.consumers]):
            obstacle = obstacle or "some of its neurons are read more often than others"
        elif site.producers[0].positions().shape[1] > 1:
            obstacle = obstacle or f"a neuron is several rows of {site.name}"
        elif consumer.norm and layers[consumer.norm].running_mean is None:
            obstacle = obstacle or f"{consumer.norm} keeps no running statistics"
        elif consumer.groups > 1 and consumer.positions().shape[1] > 1:
            obstacle = obstacle or f"a neuron is several columns of the grouped {consumer.name}"
        if obstacle:
            row.note = f"pruned, not merged: {obstacle}"
            scalings.append(None)
            continue
        key = (consumer.norm, consumer.name if consumer.groups > 1 else "")
        if key not in merged:
            merged[key] = _merge(site, consumer, keep, tensors, layers, options)
        scalings.append(merged[key])
    row.merged = max((int((scaling != 0).any(dim=1).sum()) - len(keep) for scaling in merged.values()), default=0)
    row.negative = sum(int((scaling < 0).sum()) for scaling in merged.values())
    if row.note and not merged:
        row.method = "prune"
    return scalings


def _merge(
    site: Site,
    consumer: Consumer,
    keep: Tensor,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    options: Options,
) -> Tensor:
    """Merging's scaling matrix `(n, k)`, by the tensor code or by the paper's loops."""
    producer = site.producers[0]
    threshold, lamda, formulation = options.threshold, options.lamda, options.formulation
    vectors, norm = decompose.neuron_vectors(producer, tensors, with_bias=consumer.norm is None), None
    if consumer.norm:
        member = next(member for member in site.passed if member.name == consumer.norm)
        norm = decompose.norm_parameters(member, producer, tensors, layers[consumer.norm].eps)
    groups = None
    if consumer.groups > 1:
        groups = consumer.positions()[:, 0] // (len(consumer.owner) // consumer.groups)
        groups = groups.to(vectors.device)
    if options.implementation == "fast" or groups is not None:
        return decompose.merge(vectors, keep.to(vectors.device), threshold, norm, lamda, formulation, groups)
    if norm is None:
        return reference.most_similar(vectors, keep, threshold)
    return reference.most_similar_normalised(vectors, keep, threshold, norm, lamda, formulation)
