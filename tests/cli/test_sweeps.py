"""Sweep files: as W&B takes them, and as compress.py runs them here."""

import pytest
import yaml

from nm_lightning.cli import compress
from nm_lightning.cli.sweeps import flags_of
from nm_lightning.errors import InputError
from tests import ROOT
from tests.cli import run

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_files_are_what_wandb_accepts(path):
    sweeps = pytest.importorskip("sweeps")
    content = yaml.safe_load(path.read_text())
    assert sweeps.schema_violations_from_proposed_config(content) == []
    assert (ROOT / content["program"]).is_file()
    args = compress.parse(flags_of(path))
    assert args.method == content["parameters"]["method"]["values"]
    assert args.ratio == content["parameters"]["ratio"]["values"]
    cell = [f"--{name}={entry.get('value', entry.get('values', [None])[0])}" for name, entry in
            content["parameters"].items()]  # fmt: skip
    assert compress.parse(cell).model == content["parameters"]["model"]["value"]  # as an agent calls it


def test_a_sweep_runs_here(trained, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("parameters: {method: {values: [prune, merge]}, ratio: {values: [0.5, 0.8]}}\n")
    report = run(trained, tmp_path / "out", "--sweep", str(file), "--ratio", "0.6")
    assert [(row["method"], row["ratio"]) for row in report["results"]] == [("prune", 0.6), ("merge", 0.6)]


@pytest.mark.parametrize("content", ["parameters: {ratio: {min: 0, max: 1}}", "method: grid", "[", "parameters: 3"])
def test_a_sweep_that_can_not_run_here(content, tmp_path):
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(InputError, match=r"sweep '.*sweep.yaml'"):
        flags_of(tmp_path / "sweep.yaml")
    with pytest.raises(InputError, match="can't be read"):
        flags_of(tmp_path / "none.yaml")
