"""Small images: the published normalisation, fixed test sets, seeded validation."""

import itertools

import torch
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from nm_lightning.data import build_data
from nm_lightning.data.small import CIFAR_MEAN, CIFAR_STD, crop_and_flip
from tests.data import batches
from tests.datasets import write_images


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
