"""The loaders of whoever has them, data module, LightningModule or Trainer: what to measure by, what to look at."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from nm_lightning.batches import Key, hits, inputs_and_labels, logits_of
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.statistics.synthetic import SYNTHETIC, Synthetic
from nm_lightning.compression.structure.copies import modes_kept
from nm_lightning.data import ImageData, TrainingImages
from nm_lightning.errors import InputError, first_line
from nm_lightning.measure import as_read, dealt, on_device
from nm_lightning.steps import first_batch, logged


@dataclass
class Yardstick:
    """What to measure networks by.

    Attributes:
        loader: of batches.
        stage: the module's step for them, `test` or `validation`; empty where it has none.
        batch: the first one, on the device.
        labelled: whether accuracy can be told.
    """

    loader: Any
    stage: str
    batch: Any
    labelled: bool


@dataclass
class Loaders:
    """All loaders that there are, and whose batch hooks apply.

    Attributes:
        module: whose hooks and loaders count, if it is a LightningModule.
        data: its data module, where there is one.
        device: where batches go.
        trainer: whose loaders and shares of them count, where there is one.
        keys: of the inputs and the labels in a batch, see `inputs_and_labels`.
    """

    module: nn.Module
    data: LightningDataModule | None
    device: torch.device
    trainer: Trainer | None = None
    keys: tuple[Key, Key] = (None, None)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Those of test, validation and training data, as far as there are any, each with the name of its step."""
        trainer, data = self.trainer, self.data
        if self._has("test_dataloader"):
            try:
                self._holder.setup("test")
                yield "test", only(self._holder.test_dataloader())
            except Exception as error:  # a test set that is not there; there are others
                rank_zero_warn(f"no test data, as {type(self._holder).__name__} says: {first_line(error)}")
        if (data is not None or trainer is None) and self._has("val_dataloader"):
            self._holder.setup("validate")
            yield "validation", only(self._holder.val_dataloader())
        elif trainer is not None and trainer.val_dataloaders is not None:
            yield "validation", only(trainer.val_dataloaders)
        if self.training is not None:
            yield "train", only(self.training)

    @property
    def _holder(self) -> Any:
        """Who has the loaders."""
        return self.data if self.data is not None or self.trainer is not None else self.module

    def _has(self, name: str) -> bool:
        for kind in (LightningDataModule, LightningModule):
            if isinstance(self._holder, kind):
                return is_overridden(name, self._holder, kind)
        return False

    @property
    def training(self) -> Any:
        """The loader of training images; None where there is none."""
        if self.trainer is not None:
            return self.trainer.train_dataloader
        return self._holder.train_dataloader() if self._has("train_dataloader") else None

    @property
    def hooks(self) -> Any:
        """Whose batch hooks apply: the data module's where it has any, else the module's; None for a plain network."""
        names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        if self.data is not None and any(is_overridden(name, self.data, LightningDataModule) for name in names):
            return self.data
        return self.module if isinstance(self.module, LightningModule) else None

    def first(self, loader: Any) -> Any:
        """A loader's first batch on the device; None where it can't be had."""
        batch = first_batch(only(loader))
        return None if batch is None else next(on_device([batch], self.hooks, self.device))

    def yardstick(self, network: nn.Module) -> Yardstick:
        """The first of test, validation and training data whose batches have class labels.

        Where none has, the first loader with a step, or any.

        Args:
            network: the module, or a copy of it, on the device.

        Raises:
            InputError: there is no loader.
        """
        found = []
        for stage, loader in self:
            batch = self.first(loader)
            inputs, labels = inputs_and_labels(batch, *self.keys)
            steps = isinstance(network, LightningModule) and stage != "train"
            stage = stage if steps and is_overridden(f"{stage}_step", network, LightningModule) else ""
            if isinstance(inputs, Tensor):
                with torch.no_grad(), isolate_rng(), modes_kept(network):
                    logits = logits_of(network.eval()(as_read(inputs, network)))
                if hits(logits, labels) is not None:
                    return Yardstick(loader, stage, batch, True)
            found.append(Yardstick(loader, stage, batch, False))
        if not found:
            raise InputError("no data: there is no loader of test, validation or training data")
        return next((one for one in found if one.stage), found[0])

    def metrics(self, by: Yardstick, ranks: Ranks, notes: list[str]) -> Callable[[nn.Module], dict[str, float]]:
        """What a network's own step logs, as a function of the network; nothing where accuracy can be told.

        Args:
            by: whose step and loader it is.
            ranks: that measure together.
            notes: get a line where the step fails.
        """

        def own(model: LightningModule) -> dict[str, float]:
            if by.labelled or not by.stage:
                return {}
            try:
                batches = on_device(dealt(by.loader, ranks), self.hooks, self.device)
                return logged(model, by.stage, batches, self.trainer, ranks)
            except Exception as error:  # whatever the user's step raises; the network is compressed all the same
                notes.append(f"{by.stage}_step fails by itself, its metrics are left out: {first_line(error)}")
                return {}

        return own

    def images(self, source: str, size: int, seed: int, ranks: Ranks) -> Tensor | Synthetic | str:
        """A rank's share of unlabelled images: of our data modules without augmentation, of others as they load.

        Args:
            source: `data` for training images, or validation or test images where there are none; `synthetic`; or, of
                our data modules, a folder.
            size: how many at most.
            seed: of their order.
            ranks: that each have a share.

        Returns:
            The images, or what says that compression makes them.

        Raises:
            InputError: there are none.
        """
        if isinstance(self.data, ImageData):
            return self.data.calibration_images(source, size, seed, ranks)
        if source == SYNTHETIC:
            return source
        if source != "data":
            raise InputError(f"calibration {source!r}: only our own data sets know how to read a folder: give data")
        parts, count = [], 0
        size = -(-size // ranks.size)
        loader = only(self.training)
        if loader is None:
            loader = next((each for _, each in self), None)
        if self.trainer is None:  # a Trainer has shared them out
            torch.manual_seed(seed)
            loader = dealt(loader, ranks)
        for batch in on_device(loader, self.hooks, self.device):
            inputs, _ = inputs_and_labels(batch, *self.keys)
            if not isinstance(inputs, Tensor):
                raise InputError("the batches hold no tensor of inputs: give input_key, or calibration")
            parts.append(inputs)
            count += len(inputs)
            if count >= size:
                break
        if not parts:
            raise InputError("the loader of training data has no batches to calibrate on: give calibration")
        return torch.cat(parts)[:size]

    def training_inputs(self, ranks: Ranks) -> Iterable[Tensor]:
        """All training images in batches, augmented as in training, no labels; each rank has its share.

        Raises:
            InputError: there are none.
        """
        if self.trainer is None and isinstance(self.data, ImageData):
            return TrainingImages(self.data, self.device, ranks)
        return TrainingInputs(self, ranks)

    def example(self, network: nn.Module, batch: Any) -> Tensor:
        """One input for tracing: the module's own, or a batch's first.

        Raises:
            InputError: there is none.
        """
        given = getattr(network, "example_input_array", None)
        if isinstance(given, Tensor):
            return given.to(self.device)
        inputs, _ = inputs_and_labels(batch, *self.keys)
        if not isinstance(inputs, Tensor) or not inputs.ndim:
            raise InputError("the batches hold no tensor of inputs: give input_key, or set example_input_array")
        return as_read(inputs[:1], network)


class TrainingInputs:
    """The training loader's images, in batches on the device, as in training; no labels.

    Args:
        loaders: whose they are.
        ranks: that each have a share; a Trainer has dealt it already.
    """

    def __init__(self, loaders: Loaders, ranks: Ranks):
        self.loaders, self.loader = loaders, only(loaders.training)
        if self.loader is None:
            raise InputError("finetune_on 'training': there is no loader of training images")
        if loaders.trainer is None:
            self.loader = dealt(self.loader, ranks)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        of, trainer = self.loaders, self.loaders.trainer
        with in_stage(trainer, RunningStage.TRAINING) if trainer is not None else nullcontext():
            for batch in on_device(self.loader, of.hooks, of.device):
                yield inputs_and_labels(batch, *of.keys)[0]


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
