"""The house's one road: trace, choose, decompose, narrow, refine, report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nm_lightning.compression.graph import trace
from nm_lightning.compression.recipe import Recipe
from nm_lightning.compression.report import Report
from nm_lightning.compression.selection import Auto, L2Norm, OutputAware
from nm_lightning.compression.selection.budgets import choose
from nm_lightning.compression.settings import Budget, Criterion, Method, Refinement
from nm_lightning.compression.statistics.adapted import given_back
from nm_lightning.compression.statistics.calibration import Calibration
from nm_lightning.compression.statistics.predictions import divergence
from nm_lightning.compression.statistics.proof import prove
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.statistics.synthetic import Synthetic
from nm_lightning.compression.structure.copies import check_module, check_values, plain_copy
from nm_lightning.compression.structure.decomposition import assign, narrow
from nm_lightning.compression.structure.inputs import Inputs, check_inputs
from nm_lightning.compression.structure.plan import Plan
from nm_lightning.compression.structure.sites import Site
from nm_lightning.compression.structure.unread import follow, unread
from nm_lightning.compression.structure.wrappers import unwrapped
from nm_lightning.errors import InputError

FAR = 0.1  # nats an image


@dataclass
class CompressionResult:
    """A smaller network and how it came about.

    Attributes:
        model: an ordinary network of the original's class, narrower.
        report: what happened at each site.
        plan: the surviving positions of every tensor that changed (`apply_plan` repeats the slicing).
        keep: by site, the indices of the neurons that stayed.
        sites: as they were before.
        recipe: what was asked for.
    """

    model: nn.Module
    report: Report
    plan: Plan
    keep: dict[str, Tensor]
    sites: Sequence[Site]
    recipe: Recipe


class Compressor:
    """A network that is traced once, and whose calibration images are read once, for any number of recipes.

    Args:
        model: any network whose code shapes and settings decide, also inside DDP or `torch.compile`. It is left as it
            was, and must stay as it is.
        example_input: a batch that `model` accepts: a tensor, a tuple of inputs, or a dictionary of them by name. Only
            shapes and dtypes matter.
        recipe: whose scope, attention, sites, number of images and seed apply to all that follow.
        calibration: see `compress`.
        strategy: see `compress`.
        training: see `compress`.
        whole: sites that keep their neurons, with the reason, where it is known what reads them beside `forward`; by
            default all whose width a layer reads that `forward` does not call.

    Attributes:
        subject: the network, its sites and images.
        skipped: the layers that can't be compressed, with the reason why.
        unread: what `forward` does not read.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        example_input: Inputs,
        recipe: Recipe,
        calibration: Inputs | Iterable | Synthetic | str | None = None,
        strategy: Any = None,
        whole: Mapping[str, str] | None = None,
        training: Iterable | None = None,
    ):
        check_inputs(example_input)
        check_module(model)
        if not isinstance(recipe, Recipe):
            raise InputError(f"recipe is a {type(recipe).__name__}: give a Recipe, as Recipe.from_dict reads it")
        plain, notes = plain_copy(unwrapped(model))
        found = trace(plain, example_input, recipe.scope, recipe.attention)
        self.unread = unread(plain, example_input, found, whole)
        sites = [site for site in choose(found.sites, recipe.sites) if site.name not in self.unread.whole]
        members = (member for site in sites for member in (*site.producers, *site.passed, *site.consumers))
        check_values(plain, {tensor for member in members for tensor, _ in member.slots})
        self.recipe, self.notes = recipe, notes
        self.skipped = self.unread.skipped | found.skipped | self.unread.whole
        images = Calibration(None, example_input)
        self.subject = Subject(plain, example_input, sites, images, recipe.seed)
        self.look_at(calibration, strategy, training)

    def look_at(
        self,
        calibration: Inputs | Iterable | Synthetic | str | None,
        strategy: Any = None,
        training: Iterable | None = None,
    ) -> None:
        """Take other images, and other ranks; see `compress`."""
        recipe, subject = self.recipe, self.subject
        own = recipe.calibration_size, recipe.seed, Ranks(strategy), subject.model, recipe.calibration_steps
        subject.calibration, subject.training = Calibration(calibration, subject.example, *own), training
        subject.computed.clear()

    @torch.inference_mode(False)
    def __call__(self, recipe: Recipe | None = None) -> CompressionResult:
        """Follow a recipe, by default the one that was given first."""
        recipe = recipe or self.recipe
        for name in ("scope", "attention", "sites", "calibration_size", "calibration_steps", "seed"):
            asked, known = getattr(recipe, name), getattr(self.recipe, name)
            if asked != known:
                raise InputError(f"{name} {asked!r}: the network was traced and its images drawn for {known!r}")
        self.subject.calibration.check(recipe)
        if recipe.trains and self.subject.training is None:
            raise InputError("finetune_on training: give training, a DataLoader")
        return self._noticing(recipe) if isinstance(recipe.criterion, Auto) else self._follow(recipe)

    def _noticing(self, recipe: Recipe) -> CompressionResult:
        """Choose by norm; where that changes the predictions by more than `FAR`, by `output`, too.

        Networks that `output` can't look into keep what the norm chose.
        """
        asked, subject = replace(recipe, criterion=L2Norm()), self.subject
        found, remarks = self._follow(replace(asked, then=())), []
        if recipe.method.looks and subject.calibration.telling:
            try:
                if not divergence(found.model, subject) <= FAR:
                    found = self._follow(replace(recipe, criterion=OutputAware()), found)
                    return replace(found, recipe=recipe)
            except InputError as error:
                remarks = [f"criterion l2-norm: {error}"]
        found = self._follow(asked, found) if recipe.then else found
        found.report.remarks += remarks
        return replace(found, recipe=recipe)

    def _follow(self, recipe: Recipe, first: CompressionResult | None = None) -> CompressionResult:
        """Follow a recipe; where `first` is known, at its sites and widths."""
        subject = self.subject if first is None else replace(self.subject, sites=first.sites)
        if recipe.looks and subject.calibration.synthetic:
            recipe.budget.check(self.subject)  # before images are made
            subject = replace(self.subject.adapted, sites=subject.sites)
        subject.remarks = []
        counts = recipe.budget.counts(subject) if first is None else first.report.widths
        skipped = dict(self.skipped if first is None else first.report.skipped)
        while True:
            keeps = subject.ranks.first(recipe.criterion.choose(subject, counts, recipe.method))
            proof = prove(subject, keeps)
            if not proof.blamed:
                decomposition = recipe.method.decompose(subject, keeps)
                if all(torch.equal(keep, keeps[name]) for name, keep in decomposition.keeps.items()):
                    break
                proof = prove(subject, decomposition.keeps)  # some methods choose for themselves
                if not proof.blamed:
                    break
            skipped |= proof.blamed
            subject = replace(subject, sites=[site for site in subject.sites if site.name not in proof.blamed])
            counts = recipe.budget.counts(subject) if recipe.budget.looks else counts
        if proof.narrowed and decomposition.slices_only:
            model, plan = proof.narrowed
        else:
            model, plan = narrow(subject.model, subject.sites, decomposition)
        rows = [decomposition.rows[site.name] for site in subject.sites]
        report = Report(rows, skipped, [*self.notes, *subject.calibration.remarks, *subject.remarks], str(proof))
        for refinement in recipe.then:
            assign(model, refinement.refine(subject, model, plan, report))
        if subject.model is not self.subject.model:
            assign(model, given_back(model, plan, self.subject.model, subject.model))
        plan = follow(model, plan, self.unread.copies)
        subject.ranks.agree(model)
        return CompressionResult(model, report, plan, decomposition.keeps, subject.sites, recipe)


def compress(
    model: nn.Module,
    example_input: Inputs,
    method: str | Method = "merge",
    criterion: str | Criterion = "auto",
    ratio: float | None = None,
    *,
    budget: Budget | None = None,
    then: Sequence[Refinement] = (),
    calibration: Inputs | Iterable | Synthetic | str | None = None,
    recipe: Recipe | None = None,
    strategy: Any = None,
    training: Iterable | None = None,
    **settings: Any,
) -> CompressionResult:
    """Make a trained network smaller without labels or training; prune and merge need no images either.

        compress(net, x, method="merge", criterion="l1-norm", ratio=0.5)
        compress(net, x, Reconstruct(ridge=1e-2), OutputAware(), budget=Macs(0.5), then=[Refit(2)], calibration=loader)

    Args:
        model: any network whose code shapes and settings decide, also inside DDP or `torch.compile`. It is left as it
            was.
        example_input: a batch that `model` accepts: a tensor, a tuple of inputs, or a dictionary of them by name. Only
            shapes and dtypes matter.
        method: what becomes of the removed neurons: `prune`, `merge`, `fold`, `reconstruct`, or a `Method`.
        criterion: which neurons stay: `l1-norm`, `l2-norm`, `l2-GM`, `output`, `auto`, or a `Criterion`.
        ratio: share of each site's neurons to remove, in [0, 1); 0.5 where nothing else says how many.
        budget: instead of a ratio: `Widths`, `Parameters`, `Macs`, or one of your own.
        then: what follows: `Refit`, `RecalibrateNorm`, `Distill`, or one of your own.
        calibration: unlabelled images as the network reads them: inputs like the example, a DataLoader, or `synthetic`
            for images that a program makes, see `made`. Needed by `reconstruct`, `output`, targets, and what follows.
        recipe: all of the above that is no image, in one; nothing else may be given then.
        strategy: of a Lightning `Trainer` or `Fabric` whose ranks all call this with the same network, each with its
            share of the calibration images; they all get the same result.
        training: for `finetune_on="training"`: a DataLoader of training images, as long on every rank, augmented or
            not; no labels are read.
        settings: by the names of compress.py's flags, such as `threshold`, `widths`, `sites`, `scope`, `refit` or
            `seed`; `recipe.settings()` lists them.

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
    if recipe is None:
        settings |= {} if ratio is None else {"ratio": ratio}
        recipe = Recipe.of(method, criterion, budget=budget, then=then, **settings)
    elif settings or then or not (ratio is budget is None and (method, criterion) == ("merge", "auto")):
        raise InputError("a recipe says it all: give no method, criterion, ratio, budget or setting beside it")
    return Compressor(model, example_input, recipe, calibration, strategy, training=training)()
