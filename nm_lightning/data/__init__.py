"""Data sets as LightningDataModules, by name.

| name | images | looked for, in this order |
| --- | --- | --- |
| `digits` | 1,797 of 8x8 | scikit-learn carries them |
| `fashion_mnist` | 70,000 of 28x28 | the data folder, Debian's `dataset-fashion-mnist`, a download |
| `cifar10`, `cifar100` | 60,000 of 32x32 | torchvision's files, `<name>/{train,test}/<class>/*.png`, a download |
| `imagenet` | photos | `{train,val}/<class>/*` in `<data_dir>` or `<data_dir>/imagenet` |
| `folder` | any images | `{train,val,test}/<class>/*` in `<data_dir>`, or `<class>/*` alone, split by seed |
"""

from collections.abc import Sequence

from nm_lightning.data.base import DATA_SETS, ImageData, TrainingImages
from nm_lightning.data.folders import ImageFolders
from nm_lightning.data.small import CROPS, Small, SmallImages, register
from nm_lightning.errors import InputError

__all__ = ["DATA_SETS", "ImageData", "ImageFolders", "Small", "SmallImages", "TrainingImages", "build_data", "register"]


def build_data(
    name: str = "fashion_mnist",
    data_dir: str = "data",
    batch_size: int = 128,
    num_workers: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    transforms_of: str | None = None,
    crop: str = "zeros",
    cutout: int = 0,
) -> ImageData:
    """Build a data module by its registered name.

    Args:
        name: one of `DATA_SETS`.
        data_dir: folder with the images.
        batch_size: images in a batch, on each device.
        num_workers: processes that decode photos; None for one a core, 8 at most. Small images need none.
        val_fraction: share of the training images set aside for validation where the set brings no such split.
        seed: of that split.
        image_size: height and width of a photo after cropping.
        mean: of each channel, to normalise with, in pixels from 0 to 1; None for the data set's own.
        std: likewise.
        transforms_of: pretrained weights whose own transforms apply, such as `torchvision/resnet50:DEFAULT`.
        crop: what enters CIFAR's training images as they are shifted: `zeros` or `reflect`.
        cutout: pixels of the square that is cut out of each training image; 0 for none.

    Raises:
        InputError: unknown name, settings out of range, or photos that are not there.

    >>> data = build_data("digits")
    >>> data.num_classes, data.input_shape
    (10, (1, 8, 8))
    """
    if name not in DATA_SETS:
        raise InputError(f"unknown data {name!r}: choose from {', '.join(DATA_SETS)}")
    for label, value, valid in (
        ("batch_size", batch_size, batch_size >= 1),
        ("num_workers", num_workers, num_workers is None or num_workers >= 0),
        ("val_fraction", val_fraction, 0 < val_fraction < 1),
        ("image_size", image_size, image_size >= 1),
        ("crop", crop, crop in CROPS),
        ("cutout", cutout, cutout >= 0),
        ("std", std, std is None or all(value > 0 for value in std)),
    ):
        if not valid:
            raise InputError(f"{label} {value!r} is out of range")
    settings = {
        "name": name,
        "data_dir": str(data_dir),
        "batch_size": batch_size,
        "num_workers": num_workers,
        "val_fraction": val_fraction,
        "seed": seed,
        "image_size": image_size,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "transforms_of": transforms_of,
        "crop": crop,
        "cutout": cutout,
    }
    return DATA_SETS[name](settings)
