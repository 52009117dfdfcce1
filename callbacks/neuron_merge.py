"""Prune or merge a network's neurons when training ends, and log what it cost."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
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

from nm_lightning.compression import CompressionResult, compress, cost, trace
from nm_lightning.compression.calibration import batch_length, check_size, share
from nm_lightning.compression.checkpoint import load_weights, read, sha256, write
from nm_lightning.compression.fold import compose
from nm_lightning.compression.methods import Options
from nm_lightning.compression.prepare import plain_copy
from nm_lightning.compression.ranks import Ranks
from nm_lightning.compression.report import Cost, similarity
from nm_lightning.compression.select import check_ratio
from nm_lightning.data import ImageData
from nm_lightning.errors import InputError
from nm_lightning.modules import evaluate
from nm_lightning.reporting.files import write_report
from nm_lightning.reporting.results import Baseline, Result, assemble, percent
from nm_lightning.reporting.weights_and_biases import log_compression, summary, warn_instead

SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)  # no rank has the whole network


class NeuronMergeCallback(Callback):
    """After `fit`: take the best weights, measure, compress a copy, measure again, log, and save.

    The files are `compressed.ckpt` and a report, `compressed.{html,md,json}`, beside the best checkpoint.

    The accuracies are the test set's where the data module has one, else the validation set's; without batches of
    inputs and class labels they are left out. They go, with parameters and MACs, to every logger of the Trainer as
    `accuracy/before`, `accuracy/after`, `accuracy/drop`, `parameters/before`, ...

        trainer = Trainer(callbacks=[NeuronMergeCallback(method="merge", ratio=0.5)])

    Under DDP each rank reads its share of the images, all end with the same network, and rank 0 logs and saves.

    Args:
        method: `merge`, `prune` or `reconstruct`.
        criterion: which neurons stay: `l1-norm`, `l2-norm`, `l2-GM` or `output`.
        ratio: share of each site's neurons to remove, in [0, 1).
        widths: the survivors instead: one integer for each site in order, or a mapping from site to integer.
        sites: glob patterns of layer names inside the LightningModule, such as `model.layer1.*`; None for all.
        threshold: least cosine similarity of a merged pair.
        lamda: weight of the cosine distance against the bias distance, where a BatchNorm follows.
        scope: `hidden`, or `all` for residual streams too.
        formulation: `published`, `textbook` or `consistent`.
        calibration: where `reconstruct`, `output`, `refit` and `recalibrate_norm` look for unlabelled images: `data`
            for training images, `synthetic` for images that a program draws, or a tensor as the network reads it.
        calibration_size: how many images.
        ridge: of the least squares of `reconstruct`.
        refit: rounds in which each site's layers are fitted together to the original, after any method.
        recalibrate_norm: estimate BatchNorm statistics anew on the calibration images.
        replace: leave the compressed network in the Trainer's module instead of the original; a further `fit` trains
            it on.
        filename: of the checkpoint, beside the best one.

    Attributes:
        result: of the last compression: the narrow LightningModule, the report, the plan. Strategies that spawn
            their processes leave it in those.

    Raises:
        InputError: a setting that is out of its range.
    """

    def __init__(
        self,
        method: str = "merge",
        criterion: str = "l2-norm",
        ratio: float = 0.5,
        widths: Sequence[int] | Mapping[str, int] | None = None,
        sites: str | Sequence[str] | None = None,
        threshold: float | None = 0.1,
        lamda: float = 0.85,
        formulation: str = "published",
        scope: str = "hidden",
        calibration: str | Tensor = "data",
        calibration_size: int = 1024,
        ridge: float = 1e-3,
        refit: int = 0,
        recalibrate_norm: bool = False,
        replace: bool = False,
        filename: str = "compressed.ckpt",
    ):
        self.settings: dict[str, Any] = {
            "method": method,
            "criterion": criterion,
            "ratio": ratio,
            "widths": widths,
            "sites": sites,
            "threshold": threshold,
            "lamda": lamda,
            "formulation": formulation,
            "scope": scope,
            "ridge": ridge,
            "refit": refit,
            "recalibrate_norm": recalibrate_norm,
            "calibration_size": calibration_size,
        }
        names = [setting.name for setting in fields(Options)]
        options = Options(**{name: value for name, value in self.settings.items() if name in names})
        if isinstance(calibration, str):
            options.check_images(calibration)
        check_ratio(ratio)
        self.calibration = calibration if options.looks else None
        check_size(calibration_size)
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
            check_size(self.settings["calibration_size"], Ranks(strategy))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress; the Trainer has torn its loops down, its loggers are still open."""
        stage, trainer.state.stage = trainer.state.stage, RunningStage.TESTING  # data modules augment while they train
        try:
            self._compress(trainer, pl_module)
        finally:
            trainer.state.stage = stage

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
        calibration = self.calibration
        if isinstance(calibration, str) and calibration == "data":
            calibration = _unlabelled(original, trainer, device, self.settings["calibration_size"], ranks)
        elif isinstance(calibration, Tensor):
            images = calibration[: self.settings["calibration_size"]]
            calibration = share(images, batch_length(images.shape[1:]), ranks)
        start = time.perf_counter()
        self.result = compress(original, example, calibration=calibration, strategy=trainer.strategy, **self.settings)
        seconds = time.perf_counter() - start
        sizes = [cost(module, example) for module in (original, self.result.model)]
        accuracies: list[float | None] = [None, None]
        if labelled:
            titles = ("accuracy before compression", "accuracy after compression")
            modules = (original, self.result.model)
            accuracies = [
                evaluate(module, loader, data, device, title, ranks)
                for module, title in zip(modules, titles, strict=True)
            ]
        report = self._report(trainer, original, example, sizes, accuracies, seconds)
        metrics = summary(report)
        accuracy = "not measured, as it needs batches of inputs and class labels"
        if labelled:
            accuracy = f"{percent(accuracies[0])} % to {percent(accuracies[1])} %"

        plan = compose(getattr(pl_module, "compression_plan", {}), self.result.plan)
        folder = Path(best).parent if best else Path(trainer.log_dir or trainer.default_root_dir)
        saved = trainer.is_global_zero and not trainer.fast_dev_run
        if saved:
            state = {name: value.cpu() for name, value in self.result.model.state_dict().items()}
            more = {"hyper_parameters": dict(pl_module.hparams)}
            if data is not None:
                more["datamodule_hyper_parameters"] = dict(data.hparams)
            write(folder / self.filename, state, plan, **more)
            write_report(folder / Path(self.filename).stem, report)

        def to_wandb(logger: WandbLogger) -> None:
            logger.log_metrics(metrics, step=trainer.global_step)
            if saved:
                log_compression(logger.experiment, report, folder, Path(best) if best else None)

        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, WandbLogger):
                warn_instead(to_wandb, logger)
            else:
                logger.log_metrics(metrics, step=trainer.global_step)
        rank_zero_info(
            f"{self.settings['method']}: accuracy {accuracy}, parameters {metrics['parameters/before']:,} to "
            f"{metrics['parameters/after']:,}" + (f"; saved {folder / self.filename}" if saved else "")
        )
        if self.replace:
            narrow = self.result.model.to(pl_module.device)
            for name, child in narrow._modules.items():  # aliases too
                setattr(pl_module, name, child)
            pl_module.compression_plan = plan
            for checkpoints in trainer.checkpoint_callbacks:  # what they kept is wide
                if isinstance(checkpoints, ModelCheckpoint):
                    checkpoints.best_k_models, checkpoints.best_model_score = {}, None
                    checkpoints.best_model_path = "" if trainer.fast_dev_run else str(folder / self.filename)

    def _report(
        self,
        trainer: Trainer,
        original: LightningModule,
        example: Tensor,
        sizes: Sequence[Cost],
        accuracies: Sequence[float | None],
        seconds: float,
    ) -> dict:
        """What report.json holds, as compress.py writes it."""
        found, settings = self.result, self.settings
        total = sum(site.before for site in found.report.sites)
        ratio = None if settings["widths"] is not None else settings["ratio"]
        plain = plain_copy(original)[0]
        sites = trace(plain, example, settings["scope"]).sites
        row = Result(
            settings["method"],
            settings["criterion"],
            ratio,
            accuracies[1],
            sizes[1].parameters,
            sizes[1].macs,
            round(seconds, 3),
            found.report.widths,
            found.report.notes,
            self.filename,
            1 - sum(found.report.widths.values()) / total if total else 0.0,
            found.report.sites,
            similarity(plain, sites, found.keep),
        )
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        data = type(trainer.datamodule).__name__ if trainer.datamodule is not None else "its loaders"
        about = {
            "title": f"{original.hparams.get('name', type(original).__name__)} after training",
            "model": type(original).__name__,
            "data": data,
            "origin": best or "the end of training",
            "command": "",
            "left_alone": found.report.skipped,
            "device": str(trainer.strategy.root_device),
            "ranks": trainer.world_size,
            "checkpoint_sha256": sha256(best) if trainer.is_global_zero else "",
        }
        before = Baseline(accuracies[0], sizes[0].parameters, sizes[0].macs)
        return assemble(about, before, [row])


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
