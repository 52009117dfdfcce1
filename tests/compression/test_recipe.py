"""A recipe: plain data that is read back, the same through all three doors, and refused where it makes no sense."""

import inspect
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nm_lightning import InputError, Recipe, compress, save
from nm_lightning.callbacks import NeuronMergeCallback
from nm_lightning.cli.flags import given_settings
from nm_lightning.compression import (
    Auto,
    Criterion,
    Distill,
    Macs,
    Merge,
    Method,
    OutputAware,
    Parameters,
    Prune,
    Ratio,
    RecalibrateNorm,
    Reconstruct,
    Refit,
    Widths,
)
from nm_lightning.compression.recipe import settings
from nm_lightning.compression.settings import AUTO, default_of, number, setting


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()


IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LOOSE_AND_OBJECTS = [
    ({}, Recipe()),
    ({"method": "merge", "criterion": "l1-norm", "ratio": 0.25, "threshold": None}, None),
    ({"method": "merge", "formulation": "consistent", "lamda": 0.5, "implementation": "reference"}, None),
    ({"method": "prune", "ratio": 0.4, "round_to": 4}, Recipe(Prune(), budget=Ratio(0.4, round_to=4))),
    ({"method": "prune", "widths": [3, 4]}, Recipe(Prune(), budget=Widths([3, 4]))),
    ({"method": "fold", "widths": {"0": 3}, "seed": 3}, None),
    (
        {"method": "reconstruct", "criterion": "output", "target_macs": 0.5, "ridge": 1e-2, "refit": 2},
        Recipe(Reconstruct(ridge=1e-2), OutputAware(), Macs(0.5), then=(Refit(2),)),
    ),
    (
        {"method": "reconstruct", "reconstruction": "channel", "target_parameters": 0.6, "calibration_size": 32},
        Recipe(Reconstruct(reconstruction="channel"), Auto(), budget=Parameters(0.6), calibration_size=32),
    ),
    (
        {"method": "merge", "finetune": 1, "recalibrate_norm": True, "refit": 1, "scope": "all", "sites": ["3"]},
        Recipe(then=(Refit(1), RecalibrateNorm(), Distill(1)), scope="all", sites=["3"]),
    ),
]


@pytest.mark.parametrize(("loose", "objects"), LOOSE_AND_OBJECTS)
def test_a_recipe_read_back_gives_the_same_bits(loose, objects, tmp_path):
    """From loose words, as JSON, from a checkpoint: one recipe, one network; and so do its parts as objects."""
    result = compress(network(), IMAGES[:1], calibration=IMAGES, **loose)
    save(result, tmp_path / "small.pt")
    stored = torch.load(tmp_path / "small.pt", weights_only=True)["compression_recipe"]
    back = Recipe.from_dict(json.loads(json.dumps(stored)))
    assert back.to_dict() == stored == Recipe.of(**loose).to_dict()
    if objects is not None:
        assert objects.to_dict() == stored
    again = compress(network(), IMAGES[:1], calibration=IMAGES, recipe=back).model.state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_objects_and_words_mean_the_same():
    words = compress(network(), IMAGES[:1], "reconstruct", "output", target_macs=0.5, refit=1, calibration=IMAGES)
    parts = {"budget": Macs(0.5), "then": [Refit(1)]}
    objects = compress(network(), IMAGES[:1], Reconstruct(), OutputAware(), calibration=IMAGES, **parts)
    assert words.recipe == objects.recipe
    for name, value in words.model.state_dict().items():
        assert torch.equal(value, objects.model.state_dict()[name])


def test_every_setting_goes_through_every_door(monkeypatch):
    """What the library takes, the callback's signature and the command line's flags have, with the same defaults."""
    from nm_lightning.cli import compress as script

    known = settings()
    shown = inspect.signature(NeuronMergeCallback).parameters
    flags = {action.dest: action for action in script.parser_of_flags()._actions}
    for name, own in known.items():
        assert shown[name].default == (AUTO if own.metadata["auto"] else default_of(own))
        assert name in NeuronMergeCallback.__doc__
        assert own.metadata["help"] in flags[name].help
    flat = set().union(*(Recipe.of(**loose).flat() for loose, _ in LOOSE_AND_OBJECTS))
    others = {"effort", "target_latency"}  # a word for other settings, and one whose bits depend on a clock
    assert flat | others == set(known), "the examples above leave none out"
    words = ["--threshold", "0.3", "--widths", "ip1=3", "--recalibrate_norm", "--refit", "2"]
    given = given_settings(script.parse(words))
    assert given == {"threshold": 0.3, "widths": {"ip1": 3}, "recalibrate_norm": True, "refit": 2}
    assert len(inspect.signature(compress).parameters) <= 15


@pytest.mark.parametrize(
    ("loose", "says"),
    [
        ({"method": "melt"}, "unknown method 'melt': choose from prune, merge, fold, reconstruct"),
        ({"criterion": "l3"}, "unknown criterion 'l3': choose from l1-norm"),
        ({"sharpness": 1}, "unknown setting 'sharpness': choose from"),
        ({"threshold": 2}, "threshold 2: give a number from 0 to 1"),
        ({"method": "prune", "lamda": -1}, "lamda -1: give a number from 0 to 1"),
        ({"ridge": float("inf")}, "ridge inf: give a number from 0"),
        ({"ratio": True}, "ratio True: give a number from 0"),
        ({"refit": 1.5}, "refit 1.5: give a whole number of rounds from 0"),
        ({"target_macs": 1}, "target_macs 1: give the share that may stay"),
        ({"target_macs": 0.5, "widths": [1]}, "give one of widths"),
        ({"target_macs": 0.5, "budget": Ratio(0.3)}, "give one of widths"),
        ({"rounding": "up"}, "unknown rounding 'up': choose from floor"),
        ({"calibration_size": 0}, "calibration_size 0: give a whole number from 1"),
        ({"scope": "most"}, "unknown scope 'most': choose from hidden, all"),
        ({"recipe": Recipe(), "ratio": 0.3}, "a recipe says it all"),
        ({"recipe": Recipe(), "method": "prune"}, "a recipe says it all"),
    ],
)
def test_bad_settings_are_one_line(loose, says):
    with pytest.raises(InputError, match=says):
        compress(network(), IMAGES[:1], **loose)


def test_whatever_looks_at_images_asks_for_them():
    for loose in ({"method": "reconstruct"}, {"criterion": "output"}, {"refit": 1}, {"target_macs": 0.5}):
        with pytest.raises(InputError, match="looks at images: give calibration"):
            compress(network(), IMAGES[:1], **loose)


def test_a_users_part_is_known_by_its_name_or_passed_as_an_object():
    try:

        @dataclass(frozen=True)
        class Halve(Merge):
            """As merge, with half of each scale."""

            name = "halve"
            share: float = setting(0.5, "of the scale", number(0, 1))

            def decompose(self, subject, keeps):
                found = super().decompose(subject, keeps)
                for scaling in found.scalings:
                    gone = torch.ones(len(scaling.matrix), dtype=torch.bool)
                    gone[scaling.keep] = False
                    scaling.matrix[gone] *= self.share
                return found

        by_name = compress(network(), IMAGES[:1], "halve", share=0.25, threshold=0)
        by_object = compress(network(), IMAGES[:1], Halve(share=0.25, threshold=0))
        assert by_name.recipe == by_object.recipe == Recipe.from_dict(by_name.recipe.to_dict())
        for name, value in by_name.model.state_dict().items():
            assert torch.equal(value, by_object.model.state_dict()[name])
        assert "share" in settings()
    finally:
        Method.known.pop("halve", None)
    with pytest.raises(InputError, match="unknown method 'halve'"):
        Recipe.from_dict(by_name.recipe.to_dict())


class First(Criterion):
    """The first neurons stay; it has no name."""

    def scores(self, site, subject):
        return -torch.arange(site.width).float()


def test_a_criterion_without_a_name_is_passed_as_an_object():
    result = compress(network(), IMAGES[:1], "prune", First(), 0.5)
    assert result.keep["0"].tolist() == [0, 1, 2, 3]
    assert result.recipe.to_dict()["criterion"] == {"name": "First"}
    assert "First" not in Criterion.known


def test_effort_is_a_word_for_settings_and_what_is_given_beside_it_wins():
    best = Recipe.of(
        "reconstruct", "output", attention="dimensions", spread="cost", refit=2, refit_horizon=3, ratio=0.3
    )
    assert Recipe.of(effort="best", ratio=0.3) == best
    assert Recipe.of(effort="best", ratio=0.3, refit=1).then == (Refit(1, 3),)
    assert Recipe.of(effort="best", target_macs=0.5).budget == Macs(0.5)
    assert Recipe.of(effort="normal") == Recipe.of("reconstruct", "output", attention="dimensions")
    assert Recipe.of(effort="fast") == Recipe.of()
    assert Recipe.from_dict(best.to_dict()) == best
    with pytest.raises(InputError, match="effort 'best' chooses method and criterion"):
        Recipe.of("fold", effort="best")
    with pytest.raises(InputError, match="unknown effort 'worst': choose from fast, normal, best"):
        Recipe.of(effort="worst")
