"""Options and fixtures that several test files share."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # train.py and compress.py are scripts beside the package

from nm_lightning.models import build_model  # noqa: E402

FILES = {
    "lenet_300_100": ("LeNet_300_100.original.300_100.bias.pth.tar", (1, 28, 28)),
    "resnet56": ("ResNet.cifar10.original.56.pth.tar", (3, 32, 32)),
    "vgg16": ("VGG.cifar10.original.12epochs.pth.tar", (3, 32, 32)),
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
    return lambda name: assets / "checkpoints" / FILES[name][0]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty working folder, so that `runs/` is made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
