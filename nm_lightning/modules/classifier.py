"""The LightningModule that trains every architecture of the registry."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from nm_lightning.models import build_model
from nm_lightning.modules.compressible import Compressible


class ImageClassifier(Compressible, LightningModule):
    """An image classifier: cross-entropy, SGD with momentum, a rate that drops by steps, top-1 and top-5.

    The defaults are the schedule of Kim et al. (NeurIPS 2020) for 200 epochs. A checkpoint holds all that
    `load_from_checkpoint` needs, the widths of a compressed network included.

    Args:
        name: the network's registered name, see `nm_lightning.models`.
        num_classes: number of labels; training takes it from the data.
        input_shape: `(channels, height, width)` of one image; training takes it from the data.
        widths: neurons of each hidden layer in order; None for the architecture's own.
        weights: torchvision's pretrained weights to start from, such as `DEFAULT`.
        lr: learning rate of the first epochs.
        momentum: of SGD.
        weight_decay: of SGD.
        milestones: epochs after which the rate is multiplied by `gamma`.
        gamma: that factor.
        channels_last: keep the convolutions' weights, and with them all activations, with the channels last in memory,
            which is faster with `bf16-mixed` and on GPUs.
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
    ):
        super().__init__()
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
            }  # not `weights`: a checkpoint brings its own
        )
        self.model = build_model(name, num_classes, tuple(input_shape), widths, weights)
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

    @property
    def example_input(self) -> Tensor:
        """One empty image `(1, C, H, W)`."""
        return torch.zeros(1, *self.hparams.input_shape, device=self.device)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch of the validation set."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch of the test set."""
        self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        train = stage == "train"
        self.log(f"{stage}/loss", loss, prog_bar=train, on_step=train, on_epoch=True, sync_dist=not train)
        for label in ("accuracy", "top5"):
            metric = self.metrics[f"{stage}/{label}"]
            metric.update(logits, labels)
            self.log(f"{stage}/{label}", metric, prog_bar=label == "accuracy", on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """SGD, and the rate's steps at the milestones."""
        hyper = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(hyper.milestones), hyper.gamma)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
