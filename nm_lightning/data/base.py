"""What all image data modules share: loaders of uint8 batches, normalised on the device."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from nm_lightning.compression.statistics.calibration import batch_length, check_size, share
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.synthetic import SYNTHETIC, Synthetic
from nm_lightning.data.unlabelled import draw, sample_folder
from nm_lightning.errors import InputError

DATA_SETS: dict[str, type["ImageData"]] = {}  # by name, the module that holds it


class ImageData(LightningDataModule):
    """Images and labels in three splits; batches are uint8 until they are on the device.

    A subclass sets the attributes in its `__init__` and the data sets `splits` in `setup`.

    Args:
        settings: the arguments of `build_data`, which also become the module's hyperparameters.

    Attributes:
        num_classes: number of labels.
        input_shape: `(channels, height, width)` of a normalised image.
        mean: of each channel, pixels from 0 to 1.
        std: of each channel.
        splits: data sets by name: `train`, `val` and `test`.
        whole_image: what makes a uint8 image, never augmented, of a file.
        unlabelled: training images in uint8, never augmented, those that `pick(count)` names of so many.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    num_workers: int = 0
    collate: Any = None
    whole_image: Callable
    unlabelled: Callable[[Callable[[int], Tensor]], Tensor]

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.save_hyperparameters(settings, logger=False)  # its `name` is not the network's
        self.splits: dict[str, Dataset] = {}
        self.augmenting = False

    def _set_normalisation(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        """The user's mean and std where given, else these."""
        self.mean, self.std = self.hparams.mean or list(mean), self.hparams.std or list(std)
        for label, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise InputError(f"{label} {values}: give one number for each of the {channels} channels")

    @property
    def training(self) -> bool:
        """Whether the batches are those of the training set in a `fit`, or `TrainingImages`."""
        return self.augmenting or (self.trainer is not None and self.trainer.training)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, an incomplete last batch left out."""
        size = min(self.hparams.batch_size, len(self.splits["train"]))
        return self._loader("train", size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader("val", self.hparams.batch_size, sampler=self._each_once("val"))

    def test_dataloader(self) -> DataLoader:
        """In order, never augmented."""
        return self._loader("test", self.hparams.batch_size, sampler=self._each_once("test"))

    def _each_once(self, split: str) -> UnrepeatedDistributedSampler | None:
        """A rank's part of a split, without the copies that make all parts equally long; None for a single process."""
        if self.trainer is None or self.trainer.world_size == 1:
            return None
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return UnrepeatedDistributedSampler(self.splits[split], shuffle=False, **ranks)

    def _loader(self, split: str, batch_size: int, **options: Any) -> DataLoader:
        return DataLoader(
            self.splits[split],
            batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            **options,
        )

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Normalise on the device, cut squares out of training images; their dtype becomes the network's."""
        images, labels = batch
        images = self.normalise(images)
        if self.training and self.hparams.cutout:
            images = cutout(images, self.hparams.cutout)
        module = getattr(self.trainer, "lightning_module", None)
        return images if module is None else images.to(module.dtype), labels

    def calibration_images(
        self, source: str = "data", size: int = 1024, seed: int = 0, ranks: Ranks = ALONE
    ) -> Tensor | Synthetic:
        """Images without labels as the network reads them, `(N, C, H, W)`; of several ranks, each reads its share.

        Synthetic ones are made where the network is known; here is the range of their values.

        Args:
            source: `data` for training images, `synthetic` for images that a program makes, or a folder of images.
            size: how many, at most.
            seed: which.
            ranks: the processes that compress together.

        Raises:
            InputError: there are none, or fewer than ranks.
        """
        check_size(size, ranks)

        def pick(count: int) -> Tensor:
            check_size(min(size, count), ranks)
            return share(draw(count, size, seed), batch_length(self.input_shape), ranks)

        if source == SYNTHETIC:
            extremes = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, self.input_shape[0], 1, 1)
            return Synthetic(*(tuple(each.flatten().tolist()) for each in self.normalise(extremes)))
        images = self.unlabelled(pick) if source == "data" else sample_folder(Path(source), pick, self.whole_image)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 `(N, C, H, W)` to float32 as torchvision's `ToTensor` and `Normalize` do."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return images.float().div_(255).sub_(mean).div_(std)


class TrainingImages:
    """All training images as the network reads them in training, in batches of another order each time, no labels.

    Args:
        data: whose images.
        device: where the batches are augmented.
        ranks: that each have a share of them.
        seed: of the order, over several ranks; else torch's.
    """

    def __init__(self, data: ImageData, device: torch.device | str = "cpu", ranks: Ranks = ALONE, seed: int = 0):
        data.setup("fit")
        self.data, self.device, self.passes = data, torch.device(device), 0
        split, options = data.splits["train"], {"shuffle": True}
        if ranks.size > 1:
            self.sampler = DistributedSampler(split, ranks.size, ranks.rank, seed=seed)
            options = {"sampler": self.sampler}
        self.loader = data._loader("train", min(data.hparams.batch_size, len(split)), drop_last=True, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        if hasattr(self, "sampler"):
            self.sampler.set_epoch(self.passes)
        self.passes += 1
        self.data.augmenting = True
        try:
            for batch in self.loader:
                images, _ = self.data.on_after_batch_transfer(
                    self.data.transfer_batch_to_device(batch, self.device, 0), 0
                )
                yield images
        finally:
            self.data.augmenting = False


def cutout(images: Tensor, size: int) -> Tensor:
    """Each image `(N, C, H, W)` without a square of `size` pixels around any of its own, what is over the edge aside.

    DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", 2017. Zero is the mean.
    """
    count, _, *shape = images.shape
    inside = []
    for length in shape:
        first = torch.randint(length, (count, 1), device=images.device) - size // 2
        place = torch.arange(length, device=images.device)
        inside.append((first <= place) & (place < first + size))
    rows, columns = inside
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


def seeded_split(size: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices in two parts, the second with `share` of them (at least one), drawn by seed.

    >>> [len(part) for part in seeded_split(10, 0.2, seed=0)]
    [8, 2]
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    second = max(1, round(size * share))
    return sorted(order[second:]), sorted(order[:second])
