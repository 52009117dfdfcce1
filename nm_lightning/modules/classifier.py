"""The LightningModule that trains every architecture of the registry."""

from collections.abc import Sequence
from math import isinf
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from nm_lightning.batches import inputs_and_labels, logits_of
from nm_lightning.errors import InputError
from nm_lightning.models import build_model
from nm_lightning.modules.compressible import Compressible

SCHEDULES = ("steps", "one_cycle")
OPTIMIZERS = ("sgd", "adamw")


class ImageClassifier(Compressible, LightningModule):
    """An image classifier: cross-entropy, SGD with momentum or AdamW, a rate by steps or in one cycle, top-1 and top-5.

    The defaults are the schedule of Kim et al. (NeurIPS 2020) for 200 epochs; one cycle (Smith and Topin,
    "Super-convergence", 2018) is for a few dozen. A checkpoint holds all that `load_from_checkpoint` needs, the widths
    of a compressed network included.

    Args:
        name: the network's registered name, see `nm_lightning.models`.
        num_classes: number of labels; training takes it from the data.
        input_shape: `(channels, height, width)` of one image; training takes it from the data.
        widths: neurons of each hidden layer in order; None for the architecture's own.
        weights: torchvision's pretrained weights to start from, such as `DEFAULT`.
        lr: learning rate of the first epochs, or the cycle's highest.
        optimizer: `sgd`, or `adamw`, which transformers want.
        momentum: of SGD.
        nesterov: look ahead by the momentum.
        weight_decay: of the optimizer.
        decay_all: False keeps the decay off norms and biases, the parameters of one dimension.
        label_smoothing: share of each training label that is spread over all classes.
        schedule: `steps`, or `one_cycle`: batch by batch up from `lr / 25`, after 30 % of all down to nothing.
        milestones: epochs after which the rate of `steps` is multiplied by `gamma`.
        gamma: that factor.
        channels_last: keep the convolutions' weights, and with them all activations, with the channels last in memory,
            which is faster with `bf16-mixed` and on GPUs.
        arguments: of a network of the user's own, see `nm_lightning.models.register_own`.

    Raises:
        InputError: settings out of range.
    """

    def __init__(
        self,
        name: str = "lenet_300_100",
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        widths: Sequence[int] | None = None,
        weights: str | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        milestones: Sequence[int] = (99, 150),
        gamma: float = 0.1,
        channels_last: bool = False,
        nesterov: bool = False,
        decay_all: bool = True,
        label_smoothing: float = 0.0,
        schedule: str = "steps",
        optimizer: str = "sgd",
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        if schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
        if optimizer not in OPTIMIZERS:
            raise InputError(f"unknown optimizer {optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing {label_smoothing} is out of range: give 0 to 1, without 1")
        if nesterov and momentum <= 0:
            raise InputError(f"nesterov needs a momentum over 0, not {momentum}")
        self.save_hyperparameters(
            {
                "name": name,
                "num_classes": num_classes,
                "input_shape": tuple(input_shape),
                "widths": None if widths is None else list(widths),
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "milestones": list(milestones),
                "gamma": gamma,
                "channels_last": channels_last,
                "nesterov": nesterov,
                "decay_all": decay_all,
                "label_smoothing": label_smoothing,
                "schedule": schedule,
                "optimizer": optimizer,
                **({"arguments": dict(arguments)} if arguments else {}),
            }  # not `weights`: a checkpoint brings its own
        )
        self.model = build_model(name, num_classes, tuple(input_shape), widths, weights, arguments)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        top_k = {"accuracy": 1, "top5": min(5, num_classes)}
        self.metrics = nn.ModuleDict(
            {
                f"{stage}/{label}": MulticlassAccuracy(num_classes, top_k=k, average="micro")
                for stage in ("train", "val", "test")
                for label, k in top_k.items()
            }
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's widths; what was sliced has its channels last again."""
        super().on_load_checkpoint(checkpoint)
        if self.hparams.channels_last:
            self.model.to(memory_format=torch.channels_last)

    @property
    def example_input(self) -> Tensor:
        """One empty image `(1, C, H, W)`."""
        return torch.zeros(1, *self.hparams.input_shape, device=self.device)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        return logits_of(self.model(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch with smoothed labels."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch of the validation set."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch of the test set."""
        self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = inputs_and_labels(batch)
        train = stage == "train"
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams.label_smoothing if train else 0.0)
        self.log(f"{stage}/loss", loss, prog_bar=train, on_step=train, on_epoch=True, sync_dist=not train)
        for label in ("accuracy", "top5"):
            metric = self.metrics[f"{stage}/{label}"]
            metric.update(logits, labels)
            self.log(f"{stage}/{label}", metric, prog_bar=label == "accuracy", on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and the rate's steps at the milestones or its cycle."""
        hyper = self.hparams
        decayed = [parameter for parameter in self.parameters() if hyper.decay_all or parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if not hyper.decay_all and parameter.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        if hyper.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, hyper.lr, weight_decay=hyper.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                groups, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, nesterov=hyper.nesterov
            )
        if hyper.schedule == "steps":
            scheduler, interval = MultiStepLR(optimizer, list(hyper.milestones), hyper.gamma), "epoch"
        else:
            steps = self.trainer.estimated_stepping_batches
            if isinf(steps):
                raise InputError("one_cycle needs an end: give max_epochs or max_steps")
            scheduler, interval = OneCycleLR(optimizer, hyper.lr, steps, cycle_momentum=False), "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def on_train_start(self) -> None:
        """Check that a cycle which is taken up again has the length it began with.

        Raises:
            InputError: it has another.
        """
        scheduler, steps = self.lr_schedulers(), self.trainer.estimated_stepping_batches
        if getattr(scheduler, "total_steps", steps) != steps:
            raise InputError(
                f"the checkpoint's cycle has {scheduler.total_steps} steps, not {steps}: give its max_epochs"
            )
