"""The house's one road: trace, select, decompose, fold, report."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression import decompose, select
from nm_lightning.compression.calibration import batches_of, recalibrate_norms
from nm_lightning.compression.distill import distill
from nm_lightning.compression.fold import Plan, apply_plan, named_tensors, plan_sites
from nm_lightning.compression.methods import METHODS, OUTPUT, RECONSTRUCT, Options, Work
from nm_lightning.compression.output_aware import choose_by_output, costs_of, watch
from nm_lightning.compression.prepare import evaluated, plain_copy, unwrapped
from nm_lightning.compression.ranks import Ranks
from nm_lightning.compression.refit import refit as refit_sites
from nm_lightning.compression.report import Report, SiteReport, cost
from nm_lightning.compression.sites import Site
from nm_lightning.compression.trace import trace, without_data
from nm_lightning.errors import InputError


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


@torch.inference_mode(False)
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
    reconstruction: str = "layer",
    refit: int = 0,
    recalibrate_norm: bool = False,
    target_parameters: float | None = None,
    target_macs: float | None = None,
    finetune: int = 0,
    seed: int = 0,
    strategy: Any = None,
) -> CompressionResult:
    """Make a trained network smaller without labels or training; prune and merge need no images either.

    Args:
        model: any network that `torch.fx` can trace, also inside DDP or `torch.compile`. It is left as it was.
        example_input: a batch that `model` accepts; only its shape and dtype matter.
        method: `prune` drops neurons, `merge` folds each into its most similar survivor (Kim et al., NeurIPS 2020),
            `fold` averages clusters of neurons (Model Folding, ICLR 2025), `reconstruct` solves the layers behind by
            least squares on calibration images.
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
            for images that a program draws. Needed by `reconstruct`, `output`, `refit`,
            `recalibrate_norm`, `finetune` and targets.
        calibration_size: how many of them at most.
        ridge: of the least squares, as a share of the mean diagonal of a layer's Gram matrix.
        reconstruction: `layer` solves each layer behind for itself; `channel` is GRAIL's single map from the survivors
            to all neurons, shared by all consumers.
        refit: rounds in which each site's layers are fitted together to the original, see `refit`; after any method.
        recalibrate_norm: estimate BatchNorm statistics anew at the end.
        target_parameters: instead of a ratio, the share of the network's parameters that may stay; each site gives up
            what costs least, by its measured reconstruction error on the calibration images.
        target_macs: likewise of its multiply-accumulates.
        finetune: epochs of training on the original's predictions for the calibration images, without labels.
        seed: of what is drawn: the synthetic images, and the Fisher information's labels.
        strategy: of a Lightning `Trainer` or `Fabric` whose ranks all call this with the same network, each with its
            share of the calibration images; they all get the same result.

    Returns:
        The smaller network, the report and the plan.

    Raises:
        InputError: an argument that names nothing or fits nothing, or a network that can't be traced.
        RankLost: another rank is gone.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> compress(net, torch.zeros(1, 4), ratio=0.5).model
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    options = Options(
        method=method,
        criterion=criterion,
        threshold=threshold,
        lamda=lamda,
        formulation=formulation,
        implementation=implementation,
        ridge=ridge,
        reconstruction=reconstruction,
        refit=refit,
        recalibrate_norm=recalibrate_norm,
        finetune=finetune,
        seed=seed,
    )
    select.check_ratio(ratio)
    if not isinstance(example_input, Tensor):
        raise InputError(f"example_input is a {type(example_input).__name__}: give one tensor, a batch of images")
    model, ranks = unwrapped(model), Ranks(strategy)
    narrow, notes = plain_copy(model)
    originals = named_tensors(narrow)
    found = trace(narrow, example_input, scope)
    chosen = select.choose(found.sites, sites)
    counts = select.budget(chosen, ratio, widths, rounding)

    batches, targets = [], {"parameters": target_parameters, "macs": target_macs}
    targets = {name: target for name, target in targets.items() if target is not None}
    if len(targets) > 1 or (targets and widths is not None):
        raise InputError("give one of widths, target_parameters and target_macs")
    for name, target in targets.items():
        select.check_target(name, target)
    if isinstance(calibration, str):
        options.check_images(calibration)
    looks = options.looks or "".join(f"target_{name}" for name in targets)
    if looks:
        if calibration is None:
            raise InputError(f"{looks} looks at images: give calibration, a tensor, a DataLoader or 'synthetic'")
        batches = batches_of(calibration, example_input, calibration_size, seed, ranks)
    report = Report(skipped=found.skipped, remarks=notes)
    watches = {}
    if criterion == OUTPUT or targets:
        watches = watch(evaluated(narrow), chosen, batches, seed, ranks)
    if targets:
        ((name, target),) = targets.items()
        size = partial(_size, without_data(narrow).eval(), chosen, example_input, name)
        counts = select.share_cut(chosen, costs_of(chosen, watches), size, target)
    keeps = {
        site.name: select.keep_of(site, _scores(site, originals, options.fallback).cpu(), counts[site.name])
        for site in chosen
    }
    if criterion == OUTPUT:
        by_output = ranks.first(keeps | choose_by_output(chosen, counts, watches))
        if method != RECONSTRUCT or _wins(by_output, keeps, narrow, chosen, options, batches, ranks):
            keeps = by_output
        else:
            report.remarks.append(f"output: {options.fallback} chose better on images that were held out")
    keeps = ranks.first(keeps)
    report.sites = [SiteReport(site.name, site.width, len(keeps[site.name]), method) for site in chosen]
    work = Work(narrow, chosen, keeps, report, options, batches, ranks)
    narrow, plan = METHODS[method](work)
    if refit:
        shrunk = [site for site, _, _ in work.shrinking]
        errors, refused = refit_sites(plain_copy(model)[0], narrow, shrunk, plan, batches, refit, ranks)
        for row in report.sites:
            row.error = errors.get(row.name, row.error)
        report.remarks += [f"{name}: not refit together: {reason}" for name, reason in refused.items()]
    if recalibrate_norm:
        recalibrate_norms(narrow, [images.to(example_input.dtype) for images in batches], ranks)
    if finetune:
        floating = next(parameter.dtype for parameter in narrow.parameters())
        seen = [images.to(floating) if images.is_floating_point() else images for images in batches]
        distill(narrow, evaluated(model).to(floating), seen, finetune, seed, ranks)
    ranks.agree(narrow)
    return CompressionResult(narrow, report, plan, keeps)


def _size(hollow: nn.Module, sites: Sequence[Site], example: Tensor, what: str, widths: Mapping[str, int]) -> int:
    """Parameters or MACs of the network with these widths, without its data."""
    keeps = {site.name: select.keep_of(site, torch.zeros(site.width), widths[site.name]) for site in sites}
    narrow = apply_plan(plain_copy(hollow)[0], plan_sites(sites, keeps))
    if what == "parameters":
        return sum(parameter.numel() for parameter in narrow.parameters())
    return cost(narrow, example[:1].to("meta")).macs


def _wins(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    model: nn.Module,
    sites: Sequence[Site],
    options: Options,
    batches: Sequence[Tensor],
    ranks: Ranks,
) -> bool:
    """Whether the first choice of survivors leaves the network's predictions less changed, on held-out images."""
    if len(batches) == 1:
        batches = batches[0].split((len(batches[0]) + 1) // 2)
    half = max(1, len(batches) // 4)
    seen, held_out = batches[:half], batches[-half:]
    original, divergences = evaluated(model), []
    for keeps in (first, second):
        report = Report([SiteReport(site.name, site.width, len(keeps[site.name]), options.method) for site in sites])
        narrow, _ = METHODS[options.method](Work(plain_copy(model)[0], sites, keeps, report, options, seen, ranks))
        narrow.to(seen[0].dtype).eval()
        with torch.no_grad():
            pairs = [(narrow(x.clone()).log_softmax(-1), original(x.clone()).log_softmax(-1)) for x in held_out]
        divergences += ranks.total(
            torch.stack([F.kl_div(*pair, reduction="sum", log_target=True) for pair in pairs]).sum()
        )
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
