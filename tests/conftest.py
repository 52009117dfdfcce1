"""Options, fixtures and the few settings that all tests share."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a test process on each processor, as a rank has; before torch is imported
os.environ.setdefault("WANDB_MODE", "disabled")  # tests of W&B switch it on

import pytest
import torch

from nm_lightning.data.readers import DEBIAN_FASHION_MNIST
from tests import ROOT
from tests.cli import GRID, run

torch.set_num_threads(1)

collect_ignore = ["cli/stranger"]  # a folder of its own

FILES = {
    "lenet_300_100": "LeNet_300_100.original.300_100.bias.pth.tar",
    "resnet56": "ResNet.cifar10.original.56.pth.tar",
    "vgg16": "VGG.cifar10.original.12epochs.pth.tar",
}


def pytest_addoption(parser):
    parser.addoption("--paper", action="store_true", help="check every published number, not CI's share")


def pytest_collection_modifyitems(items):
    """What takes minutes starts first, so that no process waits for it in the end."""
    long = ("test_random_networks", "test_resnet56", "test_a_strangers_network")
    items.sort(key=lambda item: item.name not in long)


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


@pytest.fixture(scope="session")
def training_run(tmp_path_factory):
    """A working folder with a training run of LeNet-300-100 on scikit-learn's digits."""
    from nm_lightning.cli import train

    folder = tmp_path_factory.mktemp("trained")
    config = str(ROOT / "configs" / "lenet_300_100_digits.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--config", config, "--trainer.max_epochs", "5", "--trainer.enable_progress_bar", "false"])
    return folder


@pytest.fixture(scope="session")
def trained(training_run):
    """Its checkpoint."""
    return training_run / "runs" / "lenet_300_100_digits" / "best.ckpt"


@pytest.fixture(scope="session")
def grid(trained, tmp_path_factory):
    """A folder with the results of every method, two criteria and two ratios, and its report."""
    folder = tmp_path_factory.mktemp("grid") / "out"
    return folder, run(trained, folder, *GRID, "--latency")
