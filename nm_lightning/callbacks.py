"""The Lightning side of compression: a callback that compresses when training ends, and logs what it cost."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from nm_lightning.compression import CompressionResult, Compressor, Criterion, Method, Recipe
from nm_lightning.compression.files.checkpoint import load_weights, read, sha256, write
from nm_lightning.compression.recipe import takes_settings
from nm_lightning.compression.settings import AUTO
from nm_lightning.compression.statistics.calibration import batch_length, check_size, share
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.structure.plan import compose
from nm_lightning.data import ImageData
from nm_lightning.errors import InputError
from nm_lightning.measure import Baseline, Measure, Result
from nm_lightning.modules import ImageClassifier
from nm_lightning.presets import filled
from nm_lightning.reporting.files import write_report
from nm_lightning.reporting.results import assemble, percent
from nm_lightning.reporting.weights_and_biases import log_compression, summary, warn_instead

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
        criterion: which neurons stay: `l1-norm`, `l2-norm`, `l2-GM`, `output`, or a `Criterion`.
        calibration: unlabelled images for whatever looks at them: `data` for training images, `synthetic` for images
            that a program draws, or a tensor as the network reads it.
        replace: leave the compressed network in the Trainer's module instead of the original; a further `fit` trains
            it on.
        filename: of the checkpoint, beside the best one.
        recipe: all about the compression in one, instead of method, criterion and settings.
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
        criterion: str | Criterion = "l2-norm",
        ratio: Any = AUTO,
        *,
        calibration: str | Tensor = "data",
        replace: bool = False,
        filename: str = "compressed.ckpt",
        recipe: Recipe | None = None,
        **settings: Any,
    ):
        self.given = {name: value for name, value in (settings | {"ratio": ratio}).items() if not is_auto(value)}
        self.choice, self.recipe = (method, criterion), recipe
        if recipe is not None and (self.given or self.choice != ("merge", "l2-norm")):
            raise InputError("NeuronMergeCallback: a recipe says it all: give no method or setting beside it")
        asked = recipe or Recipe.of(*self.choice, **self.given)
        asked.check_images(calibration)
        self.calibration = calibration if asked.looks else None
        check_size(asked.calibration_size)
        self.calibration_size = asked.calibration_size
        self.replace, self.filename = replace, filename
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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress; the Trainer has torn its loops down, its loggers are still open."""
        stage, trainer.state.stage = trainer.state.stage, RunningStage.TESTING  # data modules augment while they train
        try:
            self._compress(trainer, pl_module)
        finally:
            trainer.state.stage = stage

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

    def _compress(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = Ranks(trainer.strategy)
        original = copy.deepcopy(pl_module)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if trainer.is_global_zero and best and Path(best).is_file():
            load_weights(original, read(best)["state_dict"], best)
        device = trainer.strategy.root_device
        original.to(device)
        ranks.agree(original)

        data, loader = trainer.datamodule, _test_loader(trainer)
        example, labelled = _example(original, data, loader, device)
        recipe = self._recipe(original, data)
        calibration = self.calibration
        if isinstance(calibration, str) and calibration == "data":
            calibration = _unlabelled(original, trainer, device, recipe.calibration_size, ranks)
        elif isinstance(calibration, Tensor):
            images = calibration[: recipe.calibration_size]
            calibration = share(images, batch_length(images.shape[1:]), ranks)
        measure = Measure(example, loader if labelled else None, data, ranks)
        compressor = Compressor(original, example, recipe, calibration, trainer.strategy)
        before = measure.original(original)
        self.result, row = measure.compressed(compressor, recipe, self.filename)
        report = self._report(trainer, original, before, row)
        metrics = summary(report)

        plan = compose(getattr(pl_module, "compression_plan", {}), self.result.plan)
        folder = Path(best).parent if best else Path(trainer.log_dir or trainer.default_root_dir)
        saved = trainer.is_global_zero and not trainer.fast_dev_run
        if saved:
            state = {name: value.cpu() for name, value in self.result.model.state_dict().items()}
            more = {"hyper_parameters": dict(pl_module.hparams)}
            if data is not None:
                more["datamodule_hyper_parameters"] = dict(data.hparams)
            write(folder / self.filename, state, plan, recipe, **more)
            write_report(folder / Path(self.filename).stem, report)
        self._log(trainer, report, metrics, folder if saved else None, Path(best) if best else None)
        if self.replace:
            narrow = self.result.model.to(pl_module.device)
            for name, child in narrow._modules.items():  # aliases too
                setattr(pl_module, name, child)
            pl_module.compression_plan = plan
            for checkpoints in trainer.checkpoint_callbacks:  # what they kept is wide
                if isinstance(checkpoints, ModelCheckpoint):
                    checkpoints.best_k_models, checkpoints.best_model_score = {}, None
                    checkpoints.best_model_path = "" if trainer.fast_dev_run else str(folder / self.filename)

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


def is_auto(value: Any) -> bool:
    """Whether a setting is left to presets and defaults."""
    return isinstance(value, str) and value == AUTO


def _unlabelled(module: LightningModule, trainer: Trainer, device: torch.device, size: int, ranks: Ranks) -> Tensor:
    """A rank's share of training images: of our data modules without augmentation, of others as they load."""
    data = trainer.datamodule
    if isinstance(data, ImageData):
        return data.calibration_images("data", size, ranks=ranks).to(device)
    batches, count = [], 0
    size = -(-size // ranks.size)
    for batch in trainer.train_dataloader:
        inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(inputs, Tensor):
            raise InputError("NeuronMergeCallback: batches hold no tensor of inputs; give calibration a tensor")
        batches.append(inputs.to(device))
        if data is not None and isinstance(batch, (list, tuple)) and len(batch) == 2:
            batches[-1], _ = data.on_after_batch_transfer((batches[-1], batch[1].to(device)), 0)
        count += len(inputs)
        if count >= size:
            break
    return torch.cat(batches)[:size].to(module.dtype)


def _test_loader(trainer: Trainer) -> Any:
    """The test set's loader; where there is none the validation set's, or else the training set's."""
    data = trainer.datamodule
    if data is None:
        loader = trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
        return trainer.train_dataloader if loader is None or isinstance(loader, (list, tuple)) else loader
    for stage, hook in (("test", "test_dataloader"), ("validate", "val_dataloader"), ("fit", "train_dataloader")):
        if is_overridden(hook, data, LightningDataModule):
            data.setup(stage)
            loader = getattr(data, hook)()
            return loader[0] if isinstance(loader, (list, tuple)) else loader
    raise InputError(f"NeuronMergeCallback needs data: {type(data).__name__} has no loader")


def _example(module: LightningModule, data: Any, loader: Any, device: torch.device) -> tuple[Tensor, bool]:
    """One input for tracing (the module's own, or the loader's first), and whether batches have class labels."""
    batch = next(iter(loader))
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    labelled = pair and batch[1].ndim == 1 and not batch[1].is_floating_point()
    if isinstance(module.example_input_array, Tensor):
        return module.example_input_array.to(device), labelled
    if not pair:
        raise InputError("NeuronMergeCallback: batches are no (inputs, labels); set the module's example_input_array")
    images, labels = (part.to(device) for part in batch)
    if data is not None:
        images, _ = data.on_after_batch_transfer((images, labels), 0)
    return images[:1].to(module.dtype) if images.is_floating_point() else images[:1], labelled
