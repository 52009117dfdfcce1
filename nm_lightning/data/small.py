"""Data sets that fit in memory: one uint8 tensor, fetched and augmented by whole batches, no worker processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2 as T

from nm_lightning.data import readers
from nm_lightning.data.base import DATA_SETS, ImageData, seeded_split
from nm_lightning.models.torchvision_zoo import transforms

CROPS = {"zeros": "constant", "reflect": "reflect"}  # what enters a shifted image: black, or the image mirrored
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class Small:
    """One data set.

    Attributes:
        read: `(name, data_dir, split)` to uint8 images `(N, C, H, W)` and labels `(N,)`, split `train` or `test`.
        num_classes: number of labels.
        shape: of one image.
        mean: as published.
        std: as published.
        augment: whether training crops and flips.
    """

    read: Callable[[str, str, str], tuple[Tensor, Tensor]]
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augment: bool = False


SMALL: dict[str, Small] = {}


def register(name: str, small: Small) -> None:
    """Make a data set known by its name."""
    SMALL[name], DATA_SETS[name] = small, SmallImages


class TensorImages(Dataset):
    """Images `(N, C, H, W)` and labels `(N,)` in memory, fetched by whole batches."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


class SmallImages(ImageData):
    """Digits, FashionMNIST, CIFAR-10 or CIFAR-100."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.source = SMALL[self.hparams.name]
        self.num_classes, self.input_shape = self.source.num_classes, self.source.shape
        self.pretrained = None
        mean, std = self.source.mean, self.source.std
        if self.hparams.transforms_of:
            self.pretrained = transforms(self.hparams.transforms_of)
            self.input_shape = (3, *self.pretrained.crop_size * 2)[:3]
            mean, std = self.pretrained.mean, self.pretrained.std
        self._set_normalisation(mean, std, self.input_shape[0])

    def prepare_data(self) -> None:
        """Download what is nowhere to be found."""
        readers.download(self.hparams.name, self.hparams.data_dir)

    def setup(self, stage: str) -> None:
        """Read the splits that `stage` needs."""
        name, data_dir = self.hparams.name, self.hparams.data_dir
        if stage in ("fit", "validate") and "train" not in self.splits:
            images, labels = self.source.read(name, data_dir, "train")
            train, val = seeded_split(len(labels), self.hparams.val_fraction, self.hparams.seed)
            self.splits["train"] = TensorImages(images[train], labels[train])
            self.splits["val"] = TensorImages(images[val], labels[val])
        if stage == "test" and "test" not in self.splits:
            self.splits["test"] = TensorImages(*self.source.read(name, data_dir, "test"))

    @property
    def whole_image(self) -> Callable:
        """What makes an image of this set's size of a file."""
        channels, *size = self.source.shape
        return T.Compose([T.Grayscale(channels), T.Resize(size), T.CenterCrop(size), T.PILToTensor()][channels > 1 :])

    def unlabelled(self, pick: Callable[[int], Tensor]) -> Tensor:
        """Training images without augmentation."""
        self.setup("fit")
        images = self.splits["train"].images
        return images[pick(len(images))]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch is fetched whole."""
        return batch

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment training batches, then normalise, both on the device."""
        images, labels = batch
        if self.source.augment and self.training:
            images = crop_and_flip(images, crop=self.hparams.crop)
        return super().on_after_batch_transfer((images, labels), dataloader_idx)

    def normalise(self, images: Tensor) -> Tensor:
        """The set's own normalisation, or the whole transform of pretrained weights."""
        return super().normalise(images) if self.pretrained is None else self.pretrained(images)


register("digits", Small(readers.digits, 10, (1, 8, 8)))
register("fashion_mnist", Small(readers.fashion_mnist, 10, (1, 28, 28)))
register("cifar10", Small(readers.cifar, 10, (3, 32, 32), CIFAR_MEAN, CIFAR_STD, augment=True))
register("cifar100", Small(readers.cifar, 100, (3, 32, 32), CIFAR_MEAN, CIFAR_STD, augment=True))


def crop_and_flip(images: Tensor, padding: int = 4, crop: str = "zeros") -> Tensor:
    """Each image shifted by up to `padding` pixels, and every second one mirrored.

    The batched form of torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip`: uint8 `(N, C, H, W)` to
    the same. What enters is one of `CROPS`.
    """
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    image = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    padded = F.pad(images.float(), [padding] * 4, CROPS[crop]).to(images.dtype)  # CUDA reflects no uint8
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
