"""The paper's settings are data, and the same through compress.py and the callback; what is given wins."""

import pytest
import yaml

from nm_lightning import Recipe
from nm_lightning.callbacks import NeuronMergeCallback
from nm_lightning.cli.grid import Grid
from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier
from nm_lightning.presets import filled, preset
from tests import ROOT

FILES = sorted((ROOT / "configs" / "compress").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_a_recipe(file):
    assert Recipe.of(**yaml.safe_load(file.read_text())).flat()


def test_lenet_merges_alike_through_both_doors():
    module, data = ImageClassifier("lenet_300_100", 10, (1, 28, 28)), build_data("fashion_mnist")
    (flags,) = Grid(["merge"], ["l1-norm"], [0.6]).recipes("lenet_300_100", "fashion_mnist")
    assert NeuronMergeCallback("merge", "l1-norm", 0.6)._recipe(module, data) == flags
    assert (flags.method.threshold, flags.budget.rounding) == (0.45, "nearest")
    for given, threshold in (({"threshold": 0.1}, 0.1), ({"threshold": None}, None), ({"threshold": "auto"}, 0.45)):
        assert NeuronMergeCallback(**given)._recipe(module, data).method.threshold == threshold


def test_the_papers_widths_are_the_default_of_vgg16_alone():
    module, data = ImageClassifier("vgg16", 10, (3, 32, 32)), build_data("cifar10")
    widths = preset("vgg16", "cifar10")["widths"]
    recipe = NeuronMergeCallback()._recipe(module, data)
    assert recipe.budget.widths == widths and recipe.sites == ["model.feature.*"]
    (flags,) = Grid(["merge"], ["l2-norm"]).recipes("vgg16", "cifar10")
    assert flags.budget.widths == widths and flags.sites == ["feature.*"]
    for given in ({"ratio": 0.3}, {"sites": ["model.classifier.*"]}, {"target_macs": 0.5}):
        assert not hasattr(NeuronMergeCallback(**given)._recipe(module, data).budget, "widths")
    assert filled({"ratio": 0.3}, "vgg16", "cifar10") == {"ratio": 0.3, "sites": ["feature.*"]}


def test_other_networks_have_the_settings_own_defaults():
    module, data = ImageClassifier("lenet_300_100", 10, (1, 8, 8)), build_data("digits")
    assert NeuronMergeCallback()._recipe(module, data) == Recipe()
