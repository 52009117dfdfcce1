"""What becomes of the removed neurons, method by method: each takes the work and returns the narrow network.

To add a method, write a function `(work) -> (network, plan)` here and give it a name in `METHODS`.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nm_lightning.compression import decompose, reference, select
from nm_lightning.compression.calibration import SYNTHETIC
from nm_lightning.compression.fold import Fold, Plan, absorb, apply_plan, named_tensors, plan_sites
from nm_lightning.compression.follow import CONVOLUTIONS, SOLVABLE
from nm_lightning.compression.prepare import evaluated, own_tensors
from nm_lightning.compression.ranks import ALONE, Ranks
from nm_lightning.compression.reconstruct import reconstruct
from nm_lightning.compression.report import Report, SiteReport
from nm_lightning.compression.sites import Consumer, Site
from nm_lightning.errors import InputError

OUTPUT = "output"  # the criterion that looks at images
RECONSTRUCT = "reconstruct"  # the method that does
RECONSTRUCTIONS = ("layer", "channel")
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
    reconstruction: str = "layer"
    refit: int = 0
    recalibrate_norm: bool = False
    finetune: int = 0
    seed: int = 0

    @property
    def fallback(self) -> str:
        """The criterion where `output` can't decide."""
        return "l2-norm" if self.criterion == OUTPUT else self.criterion

    @property
    def looks(self) -> str:
        """What needs calibration images; empty if nothing does."""
        if self.method == RECONSTRUCT:
            return f"method {self.method}"
        if self.criterion == OUTPUT:
            return f"criterion {self.criterion}"
        return next((label for label in ("refit", "recalibrate_norm", "finetune") if getattr(self, label)), "")

    def check_images(self, calibration: str) -> None:
        """Raise `InputError` where synthetic images would lead astray: they say nothing of a network's predictions."""
        if calibration == SYNTHETIC and self.criterion == OUTPUT:
            raise InputError(
                "criterion output chooses badly by synthetic images: give real ones, or --criterion l2-norm"
            )

    def __post_init__(self) -> None:
        for label, choices in (
            ("method", tuple(METHODS)),
            ("criterion", (*select.CRITERIA, OUTPUT)),
            ("formulation", decompose.FORMULATIONS),
            ("implementation", IMPLEMENTATIONS),
            ("reconstruction", RECONSTRUCTIONS),
        ):
            if getattr(self, label) not in choices:
                raise InputError(f"unknown {label} {getattr(self, label)!r}: choose from {', '.join(choices)}")
        for label, value, unit in (("refit", self.refit, "rounds"), ("finetune", self.finetune, "epochs")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{label} {value!r}: give a whole number of {unit} from 0")
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
class Work:
    """What a method is given.

    Attributes:
        model: a copy of the network whose tensors are still the original's: they are replaced, never written to.
        sites: that shrink.
        keeps: by site, the survivors `(k,)`.
        report: with a row for each site, to be filled.
        options: the method's settings.
        batches: calibration images, for the methods that look; each rank has its share.
        ranks: the processes that compress together.
    """

    model: nn.Module
    sites: Sequence[Site]
    keeps: dict[str, Tensor]
    report: Report
    options: Options
    batches: Sequence[Tensor]
    ranks: Ranks = ALONE

    @property
    def shrinking(self) -> list[tuple[Site, SiteReport, Tensor]]:
        """The sites that lose neurons, with their rows and survivors."""
        rows = zip(self.sites, self.report.sites, strict=True)
        return [(site, row, self.keeps[site.name]) for site, row in rows if len(self.keeps[site.name]) < site.width]

    def folded(self, folds: Mapping[str, Sequence[Fold]]) -> tuple[nn.Module, Plan]:
        """The model, narrowed, with `folds` by weight; it owns its tensors."""
        originals = named_tensors(self.model)
        plan = plan_sites(self.sites, self.keeps)
        apply_plan(self.model, plan, folds)
        own_tensors(self.model, originals)
        return self.model, plan


def prune(work: Work) -> tuple[nn.Module, Plan]:
    """The removed neurons are dropped."""
    return work.folded({})


def merge(work: Work) -> tuple[nn.Module, Plan]:
    """Each removed neuron goes, scaled, to its most similar survivor (Kim et al., NeurIPS 2020)."""
    tensors, layers, folds = named_tensors(work.model), dict(work.model.named_modules()), defaultdict(list)
    multiply = absorb if work.options.implementation == "fast" else reference.absorb
    for site, row, keep in work.shrinking:
        scalings = _scalings(site, keep, tensors, layers, work.options, row)
        for consumer, scaling in zip(site.consumers, scalings, strict=True):
            if scaling is not None:
                folds[consumer.slots[0][0]].append(Fold(consumer, keep, scaling, multiply))
    return work.folded(folds)


def fold(work: Work) -> tuple[nn.Module, Plan]:
    """K-means over each site's neurons; a cluster becomes its mean (Model Folding, ICLR 2025; without its repair).

    The criterion has no say. Means are taken of the weights, biases and norms' parameters as they are; a site of
    several producers, of grouped consumers or of cells is pruned.
    """
    tensors, folds = named_tensors(work.model), defaultdict(list)
    means = {}
    for site, row, keep in work.shrinking:
        members = [site.producers[0], *site.passed, *site.consumers]
        plain = len(site.producers) == 1 and site.step == 1 and all(consumer.groups == 1 for consumer in site.consumers)
        if not plain or not all(member.even(site.width) for member in members):
            row.note = "pruned, not folded: several layers, groups or unequal shares make or read its neurons"
            row.method = "prune"
            continue
        vectors = decompose.neuron_vectors(site.producers[0], tensors, with_bias=True)
        labels = decompose.cluster(vectors, len(keep), work.options.seed)
        keep = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()]).sort().values
        work.keeps[site.name] = keep  # the first of each cluster stands for it
        member_of = (labels[:, None] == labels[keep]).float()  # (n, k)
        row.merged = site.width - len(keep)
        for member in (site.producers[0], *site.passed):
            positions = member.positions()
            for name, dim in member.slots:
                means.setdefault(name, []).append((dim, positions, keep, member_of / member_of.sum(dim=0)))
        for consumer in site.consumers:
            folds[consumer.slots[0][0]].append(Fold(consumer, keep, member_of, absorb))
    shared = {id(tensor): tensor for name, tensor in tensors.items() if name not in means}
    model = copy.deepcopy(work.model, shared)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, steps in means.items():
            for dim, positions, keep, share in steps:
                rows = tensors[name].movedim(dim, 0)
                mean = torch.tensordot(share.T.to(rows), rows[positions], dims=1)
                rows[positions[keep].flatten()] = mean.flatten(0, 1)
    work.model = model
    return work.folded(folds)


def reconstructed(work: Work) -> tuple[nn.Module, Plan]:
    """The layers behind are solved by least squares: each for itself, or by one map for each site."""
    return _by_channel(work) if work.options.reconstruction == "channel" else _by_layer(work)


def _by_channel(work: Work) -> tuple[nn.Module, Plan]:
    """One ridge map from the survivors to all neurons, shared by the consumers (GRAIL, CPAL 2026)."""
    layers, folds, grams, handles = dict(work.model.named_modules()), defaultdict(list), {}, []
    network = evaluated(work.model)
    for site, row, _ in work.shrinking:
        first = site.consumers[0]
        readable = isinstance(layers.get(first.name), SOLVABLE)
        plain = readable and all(consumer.groups == 1 and consumer.even(site.width) for consumer in site.consumers)
        if not plain:
            row.note = f"pruned, not reconstructed: {first.name} reads it in groups, or is no layer of its own"
            continue

        def add(layer: nn.Module, args: tuple, kwargs: dict, site: Site = site) -> None:
            name, positions = site.name, site.consumers[0].positions()
            dim = 1 if isinstance(layer, CONVOLUTIONS) else -1
            images = args[0] if args else kwargs["input"]
            entries = images.movedim(dim, -1).flatten(0, -2)[:, positions]  # (entries, n, positions of each)
            entries = entries.transpose(1, 2).flatten(0, 1)
            grams[name] = grams.get(name, 0.0) + (entries.T @ entries).double()

        handles.append(network.get_submodule(first.name).register_forward_pre_hook(add, with_kwargs=True))
    with torch.no_grad():
        for batch in work.batches:
            network(batch.clone())
    for handle in handles:
        handle.remove()
    for site, _, keep in work.shrinking:
        if site.name in grams:
            (gram,) = work.ranks.total(grams[site.name])
            scaling = decompose.channel_map(gram, keep.to(gram.device), work.options.ridge)
            for consumer in site.consumers:
                folds[consumer.slots[0][0]].append(Fold(consumer, keep, scaling, absorb))
    return work.folded(folds)


def _by_layer(work: Work) -> tuple[nn.Module, Plan]:
    """See `reconstruct`; here its new biases become part of the plan, and dtypes and modes are put back."""
    plan = plan_sites(work.sites, work.keeps)
    original = evaluated(work.model)
    narrow = copy.deepcopy(original)
    sites = [site for site, _, _ in work.shrinking]
    errors, refused = reconstruct(
        original, narrow, sites, work.keeps, work.batches, work.options.ridge, ranks=work.ranks
    )
    for site, row, _ in work.shrinking:
        names = [consumer.name for consumer in site.consumers]
        row.error = max((errors[name] for name in names if name in errors), default=None)
        row.note = next((f"pruned, not reconstructed: {refused[name]}" for name in names if name in refused), "")
    before, made = named_tensors(original), {}
    for name, bias in narrow.named_parameters():
        if name not in before:
            layer = name.removesuffix(".bias")
            made[layer] = len(bias)
            rows = [step for step in plan["slices"].get(f"{layer}.weight", []) if step[0] == 0]
            plan["slices"] |= {name: rows} if rows else {}  # it shrinks with the layer's rows
    plan |= {"biases": made} if made else {}
    apply_plan(narrow, plan)
    dtypes = {name: tensor.dtype for name, tensor in named_tensors(work.model).items()}
    for name, tensor in named_tensors(narrow).items():
        tensor.data = tensor.data.to(dtypes.get(name, dtypes.get(f"{name.removesuffix('bias')}weight", tensor.dtype)))
    for layer, before in zip(narrow.modules(), work.model.modules(), strict=True):
        layer.training = before.training
    return narrow, plan


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


METHODS = {"prune": prune, "merge": merge, "fold": fold, RECONSTRUCT: reconstructed}
