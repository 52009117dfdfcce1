"""Photos in class folders, streamed from disk: ImageNet, or any folder of images."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from nm_lightning.data.base import DATA_SETS, ImageData, seeded_split
from nm_lightning.data.unlabelled import open_image, sample_folder
from nm_lightning.errors import InputError
from nm_lightning.models.torchvision_zoo import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = 256 / 224  # the shorter side before cropping, in crops
SPLITS = ("train", "val", "test")


class ClassFolders(ImageFolder):
    """`ImageFolder` with the class indices given, so that splits agree and a class may have no images."""

    def __init__(self, root: Path, classes: list[str], transform: Callable):
        self.indices = {name: index for index, name in enumerate(classes)}
        super().__init__(str(root), transform, loader=open_image, allow_empty=True)
        if not self.samples:
            raise InputError(f"{root} has no images in class folders")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The given classes.

        Raises:
            InputError: the folder has a class that is not among them.
        """
        extra = next((name for name in _subfolders(Path(directory)) if name not in self.indices), None)
        if extra is not None:
            raise InputError(f"{directory} has a class {extra!r} that the training images lack")
        return list(self.indices), self.indices


class ImageFolders(ImageData):
    """ImageNet or a folder of the user's: standard crops, decoded by worker processes."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__(settings)
        self.root, self.classes = _find(self.hparams.name, Path(self.hparams.data_dir))
        self.num_classes = len(self.classes)
        workers = self.hparams.num_workers
        self.num_workers = min(8, os.cpu_count() or 1) if workers is None else workers
        crop, resize, interpolation = self.hparams.image_size, None, InterpolationMode.BILINEAR
        mean, std = MEAN, STD
        if self.hparams.transforms_of:
            own = transforms(self.hparams.transforms_of)
            (crop, *_), (resize, *_), interpolation = own.crop_size, own.resize_size, own.interpolation
            mean, std = own.mean, own.std
        self.input_shape = (3, crop, crop)
        self._set_normalisation(mean, std, 3)
        resize = resize or round(crop * RESIZE)
        self.transforms = {
            "train": [T.RandomResizedCrop(crop, interpolation=interpolation), T.RandomHorizontalFlip()],
            "val": [T.Resize(resize, interpolation), T.CenterCrop(crop)],
        }

    def setup(self, stage: str) -> None:
        """List the files of the splits that `stage` needs."""
        has = {split for split in SPLITS if split in _subfolders(self.root)}
        if stage in ("fit", "validate") and "val" not in self.splits:
            if has and "train" not in has and stage == "fit":
                raise InputError(
                    f"no training images in {self.root}: it needs train/<class>/<image>, or --data_dir DIR"
                )
            if "train" in has or not has:
                self.splits["train"] = self._part("train" if has else None, "train")
            if "val" in has:
                self.splits["val"] = self._part("val", "val")
            elif "train" in has or not has:
                seen = self.splits["train"]
                train, val = seeded_split(len(seen), self.hparams.val_fraction, self.hparams.seed)
                self.splits["val"] = Subset(self._part("train" if has else None, "val"), val)
                self.splits["train"] = Subset(seen, train)
        if stage == "test" and "test" not in self.splits:
            own_test = "test" in has and self.hparams.name == "folder"  # ImageNet's test images have no labels
            split = "test" if own_test else "val" if "val" in has else None
            if has and split is None:
                raise InputError(f"no test images in {self.root}: it needs val/<class>/<image>")
            self.splits["test"] = self._part(split, "test")

    @property
    def whole_image(self) -> Callable:
        """What makes a test image of a file."""
        return T.Compose([*self.transforms["val"], T.PILToTensor()])

    def unlabelled(self, pick: Callable[[int], Tensor]) -> Tensor:
        """Training images in their test crops, or those of a folder `calibration` where there is no `train`."""
        has = _subfolders(self.root)
        place = next((split for split in ("train", "calibration") if split in has), None)
        if place is not None:
            return sample_folder(self.root / place, pick, self.whole_image)
        if "val" in has:
            raise InputError(f"no calibration images in {self.root}: it needs train/ or calibration/, or --calibration")
        images = self._part(None, "val")
        return torch.stack([images[index][0] for index in pick(len(images)).tolist()])

    def _part(self, split: str | None, purpose: str) -> Any:
        """The images of a split's folder; without such folders a fifth of all, always the same, is the test set."""
        crops = self.transforms["train" if purpose == "train" else "val"]
        images = ClassFolders(self.root / (split or ""), self.classes, T.Compose([*crops, T.PILToTensor()]))
        if split is not None:
            return images
        rest, test = seeded_split(len(images), 0.2, seed=0)
        return Subset(images, test if purpose == "test" else rest)


def _find(name: str, data_dir: Path) -> tuple[Path, list[str]]:
    """The folder that holds the splits, and the classes."""
    places = (data_dir, data_dir / "imagenet") if name == "imagenet" else (data_dir,)
    for root in places:
        folders = _subfolders(root)
        split = next((split for split in ("train", "val") if split in folders), None)
        if split and _subfolders(root / split):
            return root, _subfolders(root / split)
        if name == "folder" and folders and not split:
            return root, folders
    needs = "train/<class>/<image> and val/<class>/<image>"
    also = "" if name == "imagenet" else ", or <class>/<image>"
    raise InputError(
        f"no {name} images in {' or '.join(map(str, places))}: it needs {needs}{also}; give --data_dir DIR"
    )


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


DATA_SETS |= {"imagenet": ImageFolders, "folder": ImageFolders}
