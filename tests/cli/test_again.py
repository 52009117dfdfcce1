"""Each row of a report says how to get it again."""

import json
import shlex

import pytest
import yaml

from nm_lightning.callbacks import NeuronMergeCallback
from nm_lightning.cli import compress
from nm_lightning.cli.flags import given_settings, recipe_words, source_words
from nm_lightning.cli.grid import Grid
from nm_lightning.compression import Recipe
from nm_lightning.presets import preset
from nm_lightning.reporting.page import as_callback

NETWORKS = [
    ("resnet56", "cifar10"),
    ("vgg16", "cifar10"),
    ("lenet_300_100", "fashion_mnist"),
    ("lenet_300_100", "digits"),
]
FLAGS = [
    "",
    "--method merge reconstruct --criterion l1-norm output --ratio 0.3 0.5",
    "--threshold 0.1 --rounding floor --lamda 0.85 --ratio 0.5 --sites feature.1 *.3",
    "--widths 3 4 5",
    "--widths layer1.0.conv1=3 layer1.1.conv1=4",
    "--widths a=3 --ratio 0.5 --round_to 8",
    "--target_macs 0.5 --round_to 4 --method fold --seed 3 --scope all",
    "--target_parameters 0.25 --refit 2 --finetune 1 --recalibrate_norm --calibration_size 7",
    "--method reconstruct --ridge 1e-4 --reconstruction channel --ratio 0",
]


def recipes(words, network):
    args = compress.parse(words)
    given = given_settings(args)
    return Grid(args.method, args.criterion, given.pop("ratio", None), given).recipes(*network)


@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
@pytest.mark.parametrize("flags", FLAGS)
def test_a_recipes_flags_ask_for_it(flags, network):
    for recipe in recipes(flags.split(), network):
        (again,) = recipes(recipe_words(recipe, preset(*network)), network)
        assert again.to_dict() == recipe.to_dict()
        block = yaml.safe_load(as_callback({"recipe": recipe.to_dict()}))
        (callback,) = block["trainer"]["callbacks"]
        assert callback["class_path"].endswith(NeuronMergeCallback.__name__)
        assert Recipe.of(**callback["init_args"]).to_dict() == recipe.to_dict()


def test_what_was_given_of_the_source_is_repeated():
    words = ["--model", "resnet56", "--weights", "DEFAULT", "--calibration", "a/b", "--latency", "--data_dir", "/d"]
    parser = compress.parser_of_flags()
    words += ["--input_key", "pixels", "--model.width", "32", "--data.root=images"]
    again = compress.parse(source_words(compress.parse(words), parser))
    assert vars(again) == vars(compress.parse(words))
    assert source_words(compress.parse([]), parser) == []


def test_a_rows_command_gives_it_again(training_run, tmp_path, monkeypatch, capsys):
    """Of a grid on the newest run, whose checkpoint the command names; the terminal says the first row's."""
    monkeypatch.chdir(training_run)
    compress.main(["--method", "prune", "reconstruct", "--ratio", "0.8", "--output", str(tmp_path / "grid")])
    rows = json.loads((tmp_path / "grid" / "report.json").read_text())["results"]
    assert f"again: {rows[1]['command']}\n" in capsys.readouterr().out
    page, text = ((tmp_path / "grid" / name).read_text() for name in ("report.html", "report.md"))
    for row in rows:
        assert f"<pre>{row['command']}</pre>" in page and f"    {row['command']}\n" in text
        python, script, *words = shlex.split(row["command"])
        assert (python, script) == ("python", "compress.py")
        compress.main([*words, "--output", str(tmp_path / "again"), "--quiet"])
        (same,) = json.loads((tmp_path / "again" / "report.json").read_text())["results"]
        other = {"seconds": 0, "compared": ""}  # on calibration images, where another row wants some
        assert same | other == row | other
