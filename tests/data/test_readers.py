"""Files on disk: others' formats, and one line for what is missing or corrupt."""

import gzip
import pickle

import numpy as np
import pytest
import torch

from nm_lightning.data import build_data
from nm_lightning.errors import InputError
from tests.datasets import idx, write_images


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


def test_the_data_folder_comes_before_debians(tmp_path):
    pixels, labels = np.arange(5 * 784).reshape(5, 28, 28) % 256, np.arange(5)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    data = build_data("fashion_mnist", str(tmp_path))
    data.setup("test")
    assert torch.equal(data.splits["test"].images[:, 0], torch.from_numpy(pixels).byte())
    assert data.splits["test"].labels.tolist() == labels.tolist()


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
