"""Data modules: the published normalisation, fixed test sets, seeded validation, and one line for bad files."""

import gzip
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from nm_lightning.data import build_data
from nm_lightning.data.folders import MEAN, STD
from nm_lightning.data.small import CIFAR_MEAN, CIFAR_STD, crop_and_flip
from nm_lightning.errors import InputError


def batches(data, loader):
    parts = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def test_cifar_tree_equals_torchvisions_pipeline(tmp_path):
    write_images(tmp_path / "cifar10" / "test", 10, 3, 32)
    data = build_data("cifar10", str(tmp_path), batch_size=7)
    for attempt in ("decoded", "cached"):
        data.splits.clear()
        data.setup("test")
        images, labels = batches(data, data.test_dataloader())
        transform = T.Compose([T.ToTensor(), T.Normalize(CIFAR_MEAN, CIFAR_STD)])
        expected = list(ImageFolder(str(tmp_path / "cifar10" / "test"), transform))
        torch.testing.assert_close(images, torch.stack([image for image, _ in expected]), msg=attempt)
        assert labels.tolist() == [label for _, label in expected]
    assert (tmp_path / "cifar10" / ".test.pt").is_file()


def test_cache_follows_the_folder(tmp_path):
    folder = tmp_path / "cifar10" / "test"
    write_images(folder, 10, 2, 32)
    build_data("cifar10", str(tmp_path)).setup("test")
    (folder / "class000" / "0.png").unlink()
    data = build_data("cifar10", str(tmp_path))
    data.setup("test")
    assert len(data.splits["test"]) == 19


def test_cifar_reads_torchvisions_own_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(InputError, match="corrupt"):  # torchvision knows the real files' hashes
        build_data("cifar10", str(tmp_path)).setup("test")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data = build_data("cifar10", str(tmp_path))
    data.setup("test")
    assert torch.equal(data.splits["test"].images.flatten(1), torch.from_numpy(pixels))
    assert data.splits["test"].labels.tolist() == [3, 1, 4, 1]


def test_fashion_mnist_is_whole(fashion_mnist, tmp_path):
    data = build_data("fashion_mnist", str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [54000, 6000, 10000]
    images, labels = batches(data, data.test_dataloader())
    assert images.shape == (10000, 1, 28, 28)
    assert images.min() == -1 and images.max() == 1
    assert torch.bincount(labels).tolist() == [1000] * 10


def idx(values):
    header = np.array([0x800 + values.ndim, *values.shape], dtype=">i4")
    return header.tobytes() + values.astype(np.uint8).tobytes()


def test_the_data_folder_comes_before_debians(tmp_path):
    pixels, labels = np.arange(5 * 784).reshape(5, 28, 28) % 256, np.arange(5)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    data = build_data("fashion_mnist", str(tmp_path))
    data.setup("test")
    assert torch.equal(data.splits["test"].images[:, 0], torch.from_numpy(pixels).byte())
    assert data.splits["test"].labels.tolist() == labels.tolist()


def test_validation_split_follows_the_seed_and_the_test_set_does_not():
    first, again, other = (build_data("digits", seed=seed) for seed in (0, 0, 1))
    for data in (first, again, other):
        data.setup("fit")
        data.setup("test")
    assert torch.equal(first.splits["val"].images, again.splits["val"].images)
    assert not torch.equal(first.splits["val"].images, other.splits["val"].images)
    assert torch.equal(first.splits["test"].images, other.splits["test"].images)
    assert sum(len(part) for part in first.splits.values()) == 1797


def test_crops_are_windows_of_the_padded_image():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 6, 6), dtype=torch.uint8)
    results = crop_and_flip(images, padding=2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for image, result in zip(padded, results, strict=True):
        windows = {
            (top, left, flipped)
            for top, left, flipped in itertools.product(range(5), range(5), (False, True))
            if torch.equal(result.flip(-1) if flipped else result, image[:, top : top + 6, left : left + 6])
        }
        assert len(windows) == 1
        seen |= windows
    assert len({(top, left) for top, left, _ in seen}) > 15
    assert {flipped for *_, flipped in seen} == {False, True}


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


def test_missing_data_lists_the_ways(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr("nm_lightning.data.readers.DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(InputError, match="apt install dataset-fashion-mnist"):
        build_data("fashion_mnist", str(tmp_path)).prepare_data()
    with pytest.raises(InputError, match="<class>"):
        build_data("cifar100", str(tmp_path)).prepare_data()
    for name in ("imagenet", "folder"):
        with pytest.raises(InputError, match="data_dir"):
            build_data(name, str(tmp_path / "nowhere"))


def test_corrupt_data_names_the_file(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((5, 28, 28))))[:-9])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(5)))
    with pytest.raises(InputError, match=r"t10k-images.*corrupt"):
        build_data("fashion_mnist", str(tmp_path)).setup("test")

    write_images(tmp_path / "cifar10" / "test", 10, 1, 32)
    (tmp_path / "cifar10" / "test" / "class003" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"class003/0\.png"):
        build_data("cifar10", str(tmp_path)).setup("test")

    write_images(tmp_path / "photos", 2, 2, 40)
    (tmp_path / "photos" / "class001" / "1.png").write_bytes(b"no image")
    for workers in (0, 1):
        data = build_data("folder", str(tmp_path / "photos"), num_workers=workers, val_fraction=0.5)
        data.setup("fit")
        data.setup("test")
        with pytest.raises(InputError, match=r"class001/1\.png"):
            for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
                list(loader)
