"""The Lightning side of compression: a callback that compresses when training ends, and logs what it cost."""

from collections.abc import Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from nm_lightning.batches import inputs_and_labels
from nm_lightning.compression import CompressionResult, Compressor, Criterion, Distill, Method, Recipe
from nm_lightning.compression.files.checkpoint import PLAN_KEY, read, sha256, write
from nm_lightning.compression.recipe import takes_settings
from nm_lightning.compression.selection import Ratio, Widths
from nm_lightning.compression.settings import AUTO, is_auto
from nm_lightning.compression.statistics.calibration import Calibration, batch_length, check_size, share
from nm_lightning.compression.statistics.predictions import check_logits
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.structure.copies import plain_copy, with_data
from nm_lightning.compression.structure.plan import compose
from nm_lightning.compression.structure.unread import hanging
from nm_lightning.data import ImageData
from nm_lightning.errors import InputError, first_line
from nm_lightning.in_place import averages_of, become, become_in_training, narrow_average
from nm_lightning.loaders import Loaders, in_stage
from nm_lightning.measure import Baseline, Measure, Result, as_read
from nm_lightning.modules import ImageClassifier, arguments_of
from nm_lightning.presets import filled
from nm_lightning.reporting.files import write_report
from nm_lightning.reporting.lineage import RUNS_KEY, Lineage, runs_of
from nm_lightning.reporting.results import assemble, percent
from nm_lightning.reporting.weights_and_biases import log_compression, summary, warn_instead
from nm_lightning.schedule import Schedule, is_several
from nm_lightning.steps import reads_of_training

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)  # no rank has the whole network


@takes_settings
class NeuronMergeCallback(Callback):
    """After `fit`: take the best weights, measure, compress a copy, measure again, log, and save.

    The files are `compressed.ckpt` and a report, `compressed.{html,md,json}`, beside the best checkpoint.

    The accuracies are the test set's where the data module has one, else the validation set's; without batches of
    inputs and class labels they are left out. They go, with parameters and MACs, to every logger of the Trainer as
    `accuracy/before`, `accuracy/after`, `accuracy/drop`, `parameters/before`, ...

        trainer = Trainer(callbacks=[NeuronMergeCallback(method="merge", ratio=0.5)])

    Under DDP each rank reads its share of the images, all end with the same network, and rank 0 logs and saves.
    Patterns in `sites` are of layer names inside the LightningModule, such as `model.layer1.*`. What is `auto` is the
    paper's for its networks and data sets (`configs/compress`), and the setting's default for others.

    Args:
        method: `prune`, `merge`, `fold`, `reconstruct`, or a `Method`.
        criterion: which neurons stay: `l1-norm`, `l2-norm`, `l2-GM`, `output`, `auto`, or a `Criterion`.
        calibration: unlabelled images for whatever looks at them: `data` for training images, `synthetic` for images
            that a program makes, or a tensor as the network reads it.
        replace: leave the compressed network in the Trainer's module instead of the original; a further `fit` trains
            it on.
        filename: of the checkpoint, beside the best one.
        recipe: all about the compression in one, instead of method, criterion and settings.
        input_key: of the images in a batch: a name, or a place in a tuple; None for `image`, `images`, `pixel_values`,
            `input`, `inputs` or `x`, and the first of a tuple.
        label_key: of the class labels; None for `label`, `labels`, `target`, `targets` or `y`, and the second.
        every_n_epochs: with a list of ratios, all of the original widths, and `replace=True`: after each so many epochs
            the network is compressed to the next, and training goes on with it. Optimiser state is sliced, averages of
            `WeightAveraging` too; schedules go on; "best" is the best among the narrower ones from then on.
        settings: see there.

    Attributes:
        result: of the last compression: the narrow LightningModule, the report, the plan. Strategies that spawn
            their processes leave it in those.

    Raises:
        InputError: a setting that is out of its range.
    """

    def __init__(
        self,
        method: str | Method = "merge",
        criterion: str | Criterion = "auto",
        ratio: float | list[float] | Literal["auto"] = AUTO,
        *,
        calibration: str | Tensor = "data",
        replace: bool = False,
        filename: str = "compressed.ckpt",
        recipe: Recipe | None = None,
        input_key: str | int | None = None,
        label_key: str | int | None = None,
        every_n_epochs: int | None = None,
        **settings: Any,
    ):
        self.given = {name: value for name, value in (settings | {"ratio": ratio}).items() if not is_auto(value)}
        self.schedule = None if every_n_epochs is None and not is_several(ratio) else Schedule(ratio, every_n_epochs)
        if self.schedule is not None:
            self.given["ratio"] = self.schedule.ratios[-1]
            if not replace:
                raise InputError("every_n_epochs trains the narrow network on: give replace=True")
        self.choice, self.recipe = (method, criterion), recipe
        if recipe is not None and (self.given or self.choice != ("merge", "auto")):
            raise InputError("NeuronMergeCallback: a recipe says it all: give no method or setting beside it")
        asked = recipe or Recipe.of(*self.choice, **self.given)
        self.calibration = calibration if asked.looks else None
        if self.schedule is not None and not isinstance(asked.budget, Ratio):
            raise InputError("every_n_epochs goes with ratios: give no widths or target beside them")
        check_size(asked.calibration_size)
        self.calibration_size = asked.calibration_size
        self.replace, self.filename, self.keys = replace, filename, (input_key, label_key)
        self.whole: dict[str, str] | None = None  # sites that stay so, as was found before training
        self.result: CompressionResult | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what would fail when training has ended."""
        strategy = trainer.strategy
        if isinstance(strategy, SHARDED):
            raise InputError(
                f"NeuronMergeCallback: {type(strategy).__name__} shards the weights: train without the callback, then "
                "run compress.py --checkpoint on the consolidated checkpoint"
            )
        spawned = isinstance(strategy.launcher, _MultiProcessingLauncher)
        if self.replace and spawned:
            raise InputError(
                "NeuronMergeCallback: replace=True does not reach back from spawned processes: "
                "give the Trainer strategy='ddp'"
            )
        if self.calibration is not None:
            check_size(self.calibration_size, Ranks(strategy))
        if self.schedule is not None:
            self.schedule.check(None if trainer.fast_dev_run else trainer.max_epochs)
            trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # before averages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace, plan, and look at a batch: a refusal comes now."""
        self.whole = None
        with in_stage(trainer, RunningStage.VALIDATING):
            original, loaders = _own(pl_module), self._loaders(trainer, pl_module)
            batch = loaders.first(trainer.train_dataloader)
            if batch is not None or isinstance(original.example_input_array, Tensor):
                self.whole = self._rehearse(trainer, original, loaders.example(original, batch), batch)
            elif self.schedule is not None:
                raise InputError("every_n_epochs: no batch can be looked at before training: set example_input_array")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress further, where the schedule says so: between two epochs, whose checkpoints are written."""
        widths = self.schedule.due(trainer.current_epoch) if self.schedule is not None else None
        if widths is not None:
            with in_stage(trainer, RunningStage.TESTING), isolate_rng():
                self._compress(trainer, pl_module, widths)

    def state_dict(self) -> dict[str, Any]:
        """How far the schedule has come."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the plan beside the weights, as a `Compressible` module does: `nm_lightning.load` takes the file."""
        checkpoint.setdefault(RUNS_KEY, runs_of(trainer.loggers))
        if getattr(pl_module, "compression_plan", {}):
            checkpoint[PLAN_KEY] = pl_module.compression_plan

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Averages, which were made of the wide module, become as narrow as the checkpoint's."""
        plan = checkpoint.get(PLAN_KEY, {})
        for average in averages_of(trainer):
            if getattr(average, "compression_plan", {}) != plan:
                narrow_average(average, {}, plan)
                average.compression_plan = plan

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress; the Trainer has torn its loops down, its loggers are still open."""
        if self.schedule is not None:
            return
        with in_stage(trainer, RunningStage.TESTING):  # data modules augment while they train
            self._compress(trainer, pl_module)

    def _rehearse(self, trainer: Trainer, original: LightningModule, example: Tensor, batch: Any) -> dict[str, str]:
        """Do all that can fail but training and compression; returns the sites that stay whole, with the reason.

        Args:
            trainer: that trains.
            original: a copy of its module; not needed any more.
            example: an input.
            batch: of training, on the device; None where there is none to look at.
        """
        ranks, recipe = Ranks(trainer.strategy), self._recipe(original, trainer.datamodule)
        compressor = Compressor(original, example, recipe, whole={})
        subject = compressor.subject
        if not subject.sites:
            why = next((f": {name}: {why}" for name, why in compressor.skipped.items()), "")
            raise InputError(f"NeuronMergeCallback: nothing in {type(original).__name__} can be compressed{why}")
        recipe.budget.check(subject)
        if self.schedule is not None:
            self.schedule.begin(recipe.budget, subject, trainer)
        with torch.no_grad(), isolate_rng():
            output = subject.evaluated(as_read(example, subject.evaluated))
        if any(part.looks for part in (recipe.criterion, recipe.budget)) or any(
            isinstance(each, Distill) for each in recipe.then
        ):
            check_logits(output)
        if self.calibration is not None:
            images, _ = inputs_and_labels(batch, *self.keys)
            data = images if isinstance(images, Tensor) else example
            given = data if self.calibration == "data" else self.calibration
            Calibration(given, example, 1 if isinstance(given, str) else len(given)).batches  # noqa: B018 - it looks
        if batch is None:
            return dict(Compressor(original, example, recipe).unread.whole)
        plain, _ = plain_copy(original)
        whole, read = reads_of_training(plain, subject.sites, batch, trainer)
        unseen = [name for name in compressor.unread.parameters if name not in read]
        return ranks.first(hanging(plain, unseen, compressor.unread.copies, subject.sites) | whole)

    def _recipe(self, module: LightningModule, data: Any) -> Recipe:
        """What was asked for; of our own networks and data sets, with the paper's settings for all that was not."""
        if self.recipe is not None:
            return self.recipe
        settings = self.given
        if isinstance(module, ImageClassifier) and isinstance(data, ImageData):
            settings = filled(settings, module.hparams.name, data.hparams.name)
            if "sites" in settings and "sites" not in self.given:
                settings["sites"] = [f"model.{pattern}" for pattern in settings["sites"]]
        return Recipe.of(*self.choice, **settings)

    def _compress(self, trainer: Trainer, pl_module: LightningModule, widths: Mapping[str, int] | None = None) -> None:
        """Compress the best weights; where `widths` are given, those of now, and train on with what comes of them."""
        ranks = Ranks(trainer.strategy)
        original, notes = _own(pl_module), []
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if trainer.is_global_zero and best and widths is None:
            notes += _load_best(original, best)
        device = trainer.strategy.root_device
        original.to(device)
        ranks.agree(original)

        data, loaders = trainer.datamodule, self._loaders(trainer, pl_module)
        by = loaders.yardstick(original)
        example = loaders.example(original, by.batch)
        recipe = self._recipe(original, data)
        if self.whole is None:
            self.whole = self._rehearse(trainer, _own(original), example, None)
        calibration = self.calibration
        if isinstance(calibration, str):
            calibration = loaders.images(calibration, recipe.calibration_size, recipe.seed, ranks)
        elif isinstance(calibration, Tensor):
            images = calibration[: recipe.calibration_size]
            calibration = share(images, batch_length(images.shape[1:]), ranks)
        own, loader = loaders.metrics(by, ranks, notes), by.loader if by.labelled else None
        measure = Measure(example, loader, loaders.hooks, ranks, keys=self.keys, own=own)
        training = loaders.training_inputs(ranks) if recipe.trains else None
        compressor = Compressor(original, example, recipe, calibration, trainer.strategy, self.whole, training)
        if widths is not None:
            names = [site.name for site in compressor.subject.sites]
            left = {name: widths[name] for name in names if name in widths}
            recipe = replace(recipe, budget=Widths(left, ratio=0.0))
        before = measure.original(original)
        self.result, row = measure.compressed(compressor, recipe, self.filename)
        runs = next((each.before for each in trainer.callbacks if isinstance(each, Lineage)), [])
        runs = [*runs, *runs_of(trainer.loggers)]
        more, left_out = arguments_of(pl_module, data)
        more[RUNS_KEY] = runs
        notes += left_out
        if not by.labelled and not row.logged:
            notes.append("accuracy was not measured: it needs batches of inputs and class labels, and logits")
        row.notes += notes
        self.result.report.remarks += notes
        report = {**self._report(trainer, original, before, row), RUNS_KEY: runs}
        metrics = summary(report)

        plan = compose(getattr(pl_module, "compression_plan", {}), self.result.plan)
        folder = Path(best).parent if best else Path(trainer.log_dir or trainer.default_root_dir)
        saved = trainer.is_global_zero and not trainer.fast_dev_run
        if saved:
            state = {name: value.cpu() for name, value in self.result.model.state_dict().items()}
            try:
                write(folder / self.filename, state, plan, recipe, **more)
                write_report(folder / Path(self.filename).stem, report)
            except (InputError, OSError) as error:  # the training is done, and other ranks go on
                saved = False
                rank_zero_warn(f"NeuronMergeCallback: {first_line(error)}; the callback's result holds the network")
        self._log(trainer, report, metrics, folder if saved else None, Path(best) if best else None)
        if widths is not None:
            become_in_training(trainer, pl_module, self.result.model, self.result.plan, plan)
        elif self.replace:
            become(pl_module, self.result.model, self.result.plan)
            pl_module.compression_plan = plan
            for checkpoints in trainer.checkpoint_callbacks:  # what they kept is wide
                if isinstance(checkpoints, ModelCheckpoint):
                    checkpoints.best_k_models, checkpoints.best_model_score = {}, None
                    checkpoints.best_model_path = str(folder / self.filename) if saved else ""

    def _loaders(self, trainer: Trainer, pl_module: LightningModule) -> Loaders:
        return Loaders(pl_module, trainer.datamodule, trainer.strategy.root_device, trainer, self.keys)

    def _log(
        self, trainer: Trainer, report: dict, metrics: Mapping[str, float], folder: Path | None, best: Path | None
    ) -> None:
        """To every logger, and a line for people; `folder` is where the files are, if they were saved."""

        def to_wandb(logger: WandbLogger) -> None:
            logger.log_metrics(metrics, step=trainer.global_step)
            if folder is not None:
                logger.experiment.config.update({"recipe": report["results"][0]["recipe"]}, allow_val_change=True)
                log_compression(logger.experiment, report, folder, best)

        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                warn_instead(to_wandb, logger)
            else:
                logger.log_metrics(metrics, step=trainer.global_step)
        accuracy = "not measured, as it needs batches of inputs and class labels"
        own = report["results"][0]["logged"]
        if own:
            before = report["baseline"]["logged"]
            accuracy += "".join(f", {name} {before.get(name, nan):.4g} to {value:.4g}" for name, value in own.items())
        if "accuracy/after" in metrics:
            accuracy = f"{percent(metrics['accuracy/before'])} % to {percent(metrics['accuracy/after'])} %"
        rank_zero_info(
            f"{report['results'][0]['method']}: accuracy {accuracy}, parameters {metrics['parameters/before']:,} to "
            f"{metrics['parameters/after']:,}" + (f"; saved {folder / self.filename}" if folder else "")
        )

    def _report(self, trainer: Trainer, original: LightningModule, before: Baseline, row: Result) -> dict:
        """What report.json holds, as compress.py writes it."""
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        data = type(trainer.datamodule).__name__ if trainer.datamodule is not None else "its loaders"
        about = {
            "title": f"{original.hparams.get('name', type(original).__name__)} after training",
            "model": type(original).__name__,
            "data": data,
            "origin": best or "the end of training",
            "command": "",
            "left_alone": self.result.report.skipped,
            "device": str(trainer.strategy.root_device),
            "ranks": trainer.world_size,
            "checkpoint_sha256": sha256(best) if trainer.is_global_zero else "",
        }
        return assemble(about, before, [row])


def _own(module: LightningModule) -> LightningModule:
    """A copy in memory of its own, neither compiled nor in the Trainer's hands."""
    twin = with_data(module)
    for part in twin.modules():
        vars(part).pop("_compiled_call_impl", None)  # `module.compile()`
    twin._compiler_ctx = None  # `fit(torch.compile(module))`
    return twin


def _load_best(module: LightningModule, path: str) -> list[str]:
    """Take the best weights, or say why those at the end of training are taken."""
    try:
        content = read(path)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    except Exception as error:  # a file that has gone, or whatever the user's hook raises
        return [f"the weights are those at the end of training: {Path(path).name} can't be loaded: {first_line(error)}"]
    return []
