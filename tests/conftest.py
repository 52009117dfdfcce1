"""Options, fixtures and small data sets that several test files share."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
os.environ.setdefault("WANDB_MODE", "disabled")  # tests of W&B switch it on
sys.path.insert(0, str(ROOT))  # train.py and compress.py are scripts beside the package

from nm_lightning.data.readers import DEBIAN_FASHION_MNIST  # noqa: E402
from nm_lightning.models import build_model  # noqa: E402

FILES = {
    "lenet_300_100": "LeNet_300_100.original.300_100.bias.pth.tar",
    "resnet56": "ResNet.cifar10.original.56.pth.tar",
    "vgg16": "VGG.cifar10.original.12epochs.pth.tar",
}


def pytest_addoption(parser):
    parser.addoption("--paper", action="store_true", help="check every published number, not CI's share")


@pytest.fixture(scope="session")
def assets():
    """The folder with the published checkpoints and the real images."""
    if "NM_ASSETS" not in os.environ:
        pytest.skip("NM_ASSETS is not set: it names the folder with the published checkpoints")
    return Path(os.environ["NM_ASSETS"])


@pytest.fixture(scope="session")
def published(assets):
    """A function from an architecture's name to its published checkpoint's path."""
    return lambda name: assets / "checkpoints" / FILES[name]


@pytest.fixture(scope="session")
def real_data(assets):
    """The folder with the unpacked real images."""
    folder = ROOT / "data"
    if not (folder / "cifar10" / "test").is_dir() or not (folder / "imagenet_sample" / "val").is_dir():
        pytest.skip("real images are not unpacked: see .ci/run")
    return folder


@pytest.fixture
def fashion_mnist():
    """FashionMNIST where Debian puts it."""
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("FashionMNIST is not installed: apt install dataset-fashion-mnist")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty working folder, so that `runs/` is made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    """Downloads fail at once, as on a machine that is offline."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_images(folder, classes, each, size, seed=0, extension="png"):
    """Class folders of random images."""
    random = np.random.default_rng(seed)
    for index in range(classes):
        (folder / f"class{index:03d}").mkdir(parents=True)
        for image in range(each):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{index:03d}" / f"{image}.{extension}")


def random_network(name, num_classes, shape, seed=0):
    """A network with random weights and BatchNorm statistics that are not trivial, in eval mode."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes, shape)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
