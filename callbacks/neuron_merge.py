"""Prune or merge a network's neurons when training ends, and log what it cost."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from nm_lightning.compression import CompressionResult, compress, cost
from nm_lightning.compression.checkpoint import load_weights, read, write
from nm_lightning.compression.fold import compose
from nm_lightning.compression.pipeline import Options
from nm_lightning.compression.select import check_ratio
from nm_lightning.errors import InputError
from nm_lightning.modules import evaluate


class NeuronMergeCallback(Callback):
    """After `fit`: take the best weights, measure, compress a copy, measure again, log, and save `compressed.ckpt`.

    The accuracies are the test set's where the data module has one, else the validation set's. They go, with
    parameters and MACs, to every logger of the Trainer as `accuracy/before`, `accuracy/after`, ...

        trainer = Trainer(callbacks=[NeuronMergeCallback(method="merge", ratio=0.5)])

    Args:
        method: `merge` or `prune`.
        criterion: which neurons stay: `l1-norm`, `l2-norm` or `l2-GM`.
        ratio: share of each site's neurons to remove, in [0, 1).
        widths: the survivors instead: one integer for each site in order, or a mapping from site to integer.
        sites: glob patterns of layer names inside the LightningModule, such as `model.layer1.*`; None for all.
        threshold: least cosine similarity of a merged pair.
        lamda: weight of the cosine distance against the bias distance, where a BatchNorm follows.
        formulation: `published`, `textbook` or `consistent`.
        replace: leave the compressed network in the Trainer's module instead of the original.
        filename: of the checkpoint, beside the best one.

    Attributes:
        result: of the last compression: the narrow LightningModule, the report, the plan.

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
        replace: bool = False,
        filename: str = "compressed.ckpt",
    ):
        Options(method, criterion, threshold, lamda, formulation)
        check_ratio(ratio)
        self.settings: dict[str, Any] = {
            "method": method,
            "criterion": criterion,
            "ratio": ratio,
            "widths": widths,
            "sites": sites,
            "threshold": threshold,
            "lamda": lamda,
            "formulation": formulation,
        }
        self.replace, self.filename = replace, filename
        self.result: CompressionResult | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compress; the Trainer has torn its loops down, its loggers are still open."""
        original = copy.deepcopy(pl_module)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best and Path(best).is_file():
            load_weights(original, read(best)["state_dict"], best)
        device = trainer.strategy.root_device
        original.to(device)

        data, loader = trainer.datamodule, _test_loader(trainer)
        example = _example(original, data, loader, device)
        self.result = compress(original, example, **self.settings)
        sizes = {"before": cost(original, example), "after": cost(self.result.model, example)}
        metrics: dict[str, float] = {}
        for when, module in (("before", original), ("after", self.result.model)):
            metrics[f"accuracy/{when}"] = evaluate(module, loader, data, device, f"accuracy {when} compression")
            metrics[f"parameters/{when}"] = sizes[when].parameters
            metrics[f"macs/{when}"] = sizes[when].macs
        metrics["accuracy/drop"] = metrics["accuracy/before"] - metrics["accuracy/after"]

        plan = compose(getattr(pl_module, "compression_plan", {}), self.result.plan)
        folder = Path(best).parent if best else Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            state = {name: value.cpu() for name, value in self.result.model.state_dict().items()}
            more = {"hyper_parameters": dict(pl_module.hparams)}
            if data is not None:
                more["datamodule_hyper_parameters"] = dict(data.hparams)
            write(folder / self.filename, state, plan, **more)
        rank_zero_info(
            f"{self.settings['method']}: accuracy {100 * metrics['accuracy/before']:.2f} % to "
            f"{100 * metrics['accuracy/after']:.2f} %, parameters {metrics['parameters/before']:,} to "
            f"{metrics['parameters/after']:,}; saved {folder / self.filename}"
        )
        if self.replace:
            narrow = self.result.model.to(pl_module.device)
            for name, child in narrow.named_children():
                setattr(pl_module, name, child)
            pl_module.compression_plan = plan


def _test_loader(trainer: Trainer) -> Any:
    """The test set's loader, or the validation set's where there is no test set."""
    data = trainer.datamodule
    if data is None:
        return trainer.val_dataloaders
    try:
        data.setup("test")
        return data.test_dataloader()
    except NotImplementedError:
        return data.val_dataloader()
    except Exception as error:
        # Lightning's own base class raises its MisconfigurationException where a hook is missing
        if type(error).__name__ == "MisconfigurationException":
            return data.val_dataloader()
        raise


def _example(module: LightningModule, data: Any, loader: Any, device: torch.device) -> Tensor:
    """One image for tracing: the module's own example, or the first of the loader."""
    if isinstance(module.example_input_array, Tensor):
        return module.example_input_array.to(device)
    if loader is None:
        raise InputError("NeuronMergeCallback needs data: give the Trainer a validation set or a data module")
    images, labels = (part.to(device) for part in next(iter(loader)))
    if data is not None:
        images, _ = data.on_after_batch_transfer((images, labels), 0)
    return images[:1]
