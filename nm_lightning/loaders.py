"""What a Trainer's loaders give outside of its loops."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from nm_lightning.batches import Key, inputs_and_labels
from nm_lightning.errors import first_line
from nm_lightning.measure import on_device
from nm_lightning.steps import first_batch


class TrainingInputs:
    """The Trainer's training images, in batches on the device, augmented as in training; no labels.

    Args:
        trainer: whose loader it is.
        module: that it trains.
        keys: of images and labels in a batch, where they have no name that is known.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, keys: tuple[Key, Key]):
        self.trainer, self.module, self.keys = trainer, module, keys
        self.loader = only(trainer.train_dataloader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        hooks, device = hooks_of(self.trainer, self.module), self.trainer.strategy.root_device
        with in_stage(self.trainer, RunningStage.TRAINING):
            for batch in on_device(self.loader, hooks, device):
                yield inputs_and_labels(batch, *self.keys)[0]


@contextmanager
def in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """The Trainer says that it is in another stage."""
    before, trainer.state.stage = trainer.state.stage, stage
    try:
        yield
    finally:
        trainer.state.stage = before


def only(loader: Any) -> Any:
    """The first of several loaders."""
    while isinstance(loader, (list, tuple, Mapping)):
        loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader), None)
    return loader


def loaders(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """Those of test, validation and training data, as far as there are any, each with the name of its step."""
    data = trainer.datamodule
    if data is not None and is_overridden("test_dataloader", data, LightningDataModule):
        try:
            data.setup("test")
            yield "test", only(data.test_dataloader())
        except Exception as error:  # a test set that is not there; there are others
            rank_zero_warn(f"NeuronMergeCallback: no test data, as {type(data).__name__} says: {first_line(error)}")
    if data is not None and is_overridden("val_dataloader", data, LightningDataModule):
        data.setup("validate")
        yield "validation", only(data.val_dataloader())
    elif trainer.val_dataloaders is not None:
        yield "validation", only(trainer.val_dataloaders)
    if trainer.train_dataloader is not None:
        yield "train", only(trainer.train_dataloader)


def hooks_of(trainer: Trainer, module: LightningModule) -> Any:
    """Whose batch hooks apply: the data module's where it has any, else the module's."""
    data = trainer.datamodule
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    own = data is not None and any(is_overridden(name, data, LightningDataModule) for name in names)
    return data if own else module


def first_of(trainer: Trainer, module: LightningModule, loader: Any) -> Any:
    """A loader's first batch on the device; None where it can't be had."""
    batch = first_batch(only(loader))
    device = trainer.strategy.root_device
    return None if batch is None else next(on_device([batch], hooks_of(trainer, module), device))
