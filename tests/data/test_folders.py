"""Folders of images: torchvision's pipeline, ImageNet's indices, splits and transforms."""

import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from nm_lightning.data import build_data
from nm_lightning.data.folders import MEAN, STD
from nm_lightning.errors import InputError
from tests.data import batches
from tests.datasets import write_images


def test_imagenet_equals_torchvisions_pipeline_and_keeps_empty_classes(tmp_path):
    write_images(tmp_path / "val", 6, 2, 300, extension="jpg")
    for index in (1, 4):
        for file in (tmp_path / "val" / f"class{index:03d}").iterdir():
            file.unlink()
    data = build_data("imagenet", str(tmp_path), batch_size=3, num_workers=0)
    data.setup("test")
    images, labels = batches(data, data.test_dataloader())
    transform = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    expected = list(ImageFolder(str(tmp_path / "val"), transform, allow_empty=True))
    torch.testing.assert_close(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [0, 0, 2, 2, 3, 3, 5, 5]
    assert data.num_classes == 6


def test_real_imagenet_sample_has_imagenets_indices(real_data):
    data = build_data("imagenet", str(real_data / "imagenet_sample"))
    data.setup("test")
    assert data.num_classes == 1000
    assert len(data.splits["test"]) == 500
    classes = sorted(folder.name for folder in (real_data / "imagenet_sample" / "val").iterdir())
    assert all(classes[label] == path.split("/")[-2] for path, label in data.splits["test"].samples)


def test_folder_without_splits_is_split_by_seed(tmp_path):
    write_images(tmp_path, 3, 10, 40)
    data = build_data("folder", str(tmp_path), num_workers=0, image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    data.setup("fit")
    data.setup("test")
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 22, "val": 2, "test": 6}
    images, _ = batches(data, data.test_dataloader())
    assert images.shape == (6, 3, 32, 32)
    assert images.min() >= -2 and images.max() <= 2


def test_folder_splits_share_the_training_classes(tmp_path):
    write_images(tmp_path / "train", 3, 4, 40)
    write_images(tmp_path / "test", 3, 2, 40)
    for file in (tmp_path / "test" / "class000").iterdir():
        file.unlink()
    (tmp_path / "test" / "class000").rmdir()
    data = build_data("folder", str(tmp_path), num_workers=0)
    data.setup("test")
    assert [label for _, label in data.splits["test"].samples] == [1, 1, 2, 2]
    (tmp_path / "test" / "other").mkdir()
    with pytest.raises(InputError, match="'other'"):
        build_data("folder", str(tmp_path)).setup("test")


def test_pretrained_weights_bring_their_transforms(tmp_path):
    write_images(tmp_path / "val", 2, 1, 300)
    data = build_data("imagenet", str(tmp_path), num_workers=0, transforms_of="torchvision/inception_v3:DEFAULT")
    data.setup("test")
    images, _ = batches(data, data.test_dataloader())
    from torchvision.models import Inception_V3_Weights

    own = Inception_V3_Weights.DEFAULT.transforms()
    expected = torch.stack([own(Image.open(path)) for path, _ in data.splits["test"].samples])
    torch.testing.assert_close(images, expected)
    assert data.input_shape == (3, 299, 299)
