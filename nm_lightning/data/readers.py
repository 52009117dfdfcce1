"""Where the small data sets lie, and how their files become one uint8 tensor."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as sets
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from nm_lightning.errors import InputError
from nm_lightning.progress import progress

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION = {"fashion_mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}
DOWNLOADED = {"fashion_mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def download(name: str, data_dir: str) -> None:
    """Fetch a data set into `data_dir` with torchvision, unless one of its places already has it.

    Raises:
        InputError: it can't be reached; the message lists the other ways.
    """
    if name not in TORCHVISION or _found(name, data_dir):
        return
    try:
        TORCHVISION[name](data_dir, download=True)
    except (OSError, RuntimeError) as error:
        if name == "fashion_mnist":
            ways = "put its four idx files there, apt install dataset-fashion-mnist"
        else:
            ways = f"put torchvision's files there, or images as {data_dir}/{name}/{{train,test}}/<class>/*.png"
        raise InputError(
            f"no {name} in {data_dir!r} and no download ({error}): {ways}, or give --data_dir DIR"
        ) from error


def _found(name: str, data_dir: str) -> bool:
    if name == "fashion_mnist":
        return any(_idx_file(data_dir, split, "labels") for split in ("train", "test"))
    return (Path(data_dir) / DOWNLOADED[name]).is_dir() or (Path(data_dir) / name).is_dir()


def digits(name: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: a fifth of each class, always the same, is the test set."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    images, labels = (train_images, train_labels) if split == "train" else (test_images, test_labels)
    return (images * (255 / 16)).round().byte().view(-1, 1, 8, 8), labels.long()


def fashion_mnist(name: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    """FashionMNIST from its idx files, packed or not."""
    images, labels = (_idx_file(data_dir, split, kind) for kind in ("images", "labels"))
    if images is None or labels is None:
        raise InputError(f"fashion_mnist's {split} files are missing from {data_dir!r}: remove the rest to download")
    pixels, targets = _read_idx(images, 16).view(-1, 1, 28, 28), _read_idx(labels, 8).long()
    if len(pixels) != len(targets):
        raise InputError(f"{images} has {len(pixels)} images for {len(targets)} labels: replace it")
    return pixels, targets


def _idx_file(data_dir: str, split: str, kind: str) -> Path | None:
    stem = f"{'train' if split == 'train' else 't10k'}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    folder = Path(data_dir)
    for place in (folder / DOWNLOADED["fashion_mnist"], folder / "fashion_mnist", folder, DEBIAN_FASHION_MNIST):
        for file in (place / stem, place / f"{stem}.gz"):
            if file.is_file():
                return file
    return None


def _read_idx(path: Path, header: int) -> Tensor:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        numbers = np.frombuffer(content, dtype=">i4", count=header // 4)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
        if int(numbers[0]) >> 8 != 8 or len(values) != int(np.prod(numbers[1:], dtype=np.int64)):
            raise ValueError("its header does not fit its length")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is corrupt ({error}): replace it") from error
    return values


def cifar(name: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR from torchvision's files, else from class folders of images."""
    if (Path(data_dir) / DOWNLOADED[name]).is_dir():
        try:
            data = TORCHVISION[name](data_dir, train=split == "train")
        except (RuntimeError, OSError, EOFError) as error:
            raise InputError(f"{Path(data_dir) / DOWNLOADED[name]} is corrupt ({error}): replace it") from error
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    return _class_folders(Path(data_dir) / name / split, 10 if name == "cifar10" else 100)


def _class_folders(folder: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Decode `<class>/*.png` once; a cache beside the folder, made anew when files come or go, serves later runs."""
    try:
        tree = sets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no images in class folders ({error})") from error
    if len(tree.classes) != classes:
        raise InputError(f"{folder} has {len(tree.classes)} class folders, not {classes}")
    signature = [len(tree), max((folder / name).stat().st_mtime_ns for name in tree.classes)]
    cache = folder.with_name(f".{folder.name}.pt")
    if cache.is_file():
        try:
            content = torch.load(cache, weights_only=True)
            if content["signature"] == signature:
                return content["images"], content["labels"]
        except Exception:  # whatever a broken cache raises, the images are still there
            pass

    images = np.empty((len(tree), 32, 32, 3), dtype=np.uint8)
    for index, (path, _) in enumerate(progress(tree.samples, f"reading {folder}")):
        try:
            with Image.open(path) as image:
                images[index] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path} is not a 32x32 image ({error}): replace it") from error
    result = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(tree.targets)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        torch.save({"signature": signature, "images": result[0], "labels": result[1]}, partial)
        partial.replace(cache)
    except (OSError, RuntimeError):  # a folder that can't be written serves without a cache
        partial.unlink(missing_ok=True)
    return result
