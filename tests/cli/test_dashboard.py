"""The dashboard shows what runs log."""

import json

import pytest

from nm_lightning.cli import dashboard
from nm_lightning.reporting.weights_and_biases import summary


@pytest.mark.xdist_group("grid")
def test_the_dashboard_by_its_specification(grid, capsys):
    """Every number it shows is one that a run logs."""
    dashboard.main(["--wandb_entity", "us", "--dry_run"])
    spec = json.loads(capsys.readouterr().out)
    assert (spec["entity"], spec["project"]) == ("us", "nm-lightning")
    panels = [
        panel for section in spec["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]
    assert len(panels) == 13
    text = json.dumps(spec)
    report = {**grid[1], "results": grid[1]["results"][:1]}
    for name in summary(report):
        if not name.endswith("/before") or name.startswith("accuracy"):
            assert name in text, name


def test_training_logs_what_the_dashboard_shows(trained):
    columns = (trained.parent / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"train/loss_epoch", "train/accuracy", "train/top5", "val/accuracy", "val/top5", "lr-SGD"}
    assert wanted | {"train/device/samples_per_sec"} <= set(columns)
