"""Whatever logger: it gets the callback's numbers, and a compression names the training that it comes from."""

import json

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger

import train
from callbacks import NeuronMergeCallback
from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier
from nm_lightning.reporting.lineage import RUNS_KEY, Lineage
from tests import ROOT
from tests.cli import run
from tests.reporting.test_weights_and_biases import nested, records

QUICK = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
DIGITS = ["--config", str(ROOT / "configs" / "lenet_300_100_digits.yaml"), *QUICK]
COMPRESSED = ["--trainer.callbacks+=callbacks.NeuronMergeCallback", "--trainer.callbacks.ratio", "0.5"]


def from_csv(folder):
    (file,) = folder.rglob("metrics.csv")
    header, *rows = (line.split(",") for line in file.read_text().splitlines())
    return {name: float(value) for row in rows for name, value in zip(header, row, strict=True) if value}


def from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(*place)).Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


def from_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    (found,) = client.search_runs([experiment.experiment_id])
    return found.data.metrics


LOGGERS = {  # class: its package, its flags, how its numbers are read
    "CSVLogger": ("csv", ["save_dir", "logs"], from_csv),
    "TensorBoardLogger": ("tensorboard", ["save_dir", "logs"], from_tensorboard),
    "MLFlowLogger": ("mlflow", ["experiment_name", "digits", "tracking_uri", "file:{folder}/mlruns"], from_mlflow),
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_before_and_after_reach_every_logger(logger, in_tmp, monkeypatch):
    package, settings, numbers = LOGGERS[logger]
    pytest.importorskip(package)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    words = [word.format(folder=in_tmp) for word in settings]
    flags = [f"--trainer.logger.{word}" if not place % 2 else word for place, word in enumerate(words)]
    train.main([*DIGITS, "--trainer.logger", logger, *flags, *COMPRESSED])
    report = json.loads((in_tmp / "runs" / "lenet_300_100_digits" / "compressed.json").read_text())
    (row,), before = report["results"], report["baseline"]
    found = numbers(in_tmp)
    for what in ("accuracy", "parameters", "macs"):
        assert found[f"{what}/before"] == pytest.approx(before[what], rel=1e-6)
        assert found[f"{what}/after"] == pytest.approx(row[what], rel=1e-6)
    assert found["accuracy/drop"] == pytest.approx(before["accuracy"] - row["accuracy"], abs=1e-6)
    assert found["compression/seconds"] == pytest.approx(row["seconds"], rel=1e-6)
    assert 0 < found["val/accuracy"] <= 1
    (known,) = report[RUNS_KEY]
    assert known["logger"] == logger
    assert len(list(in_tmp.rglob(f"*{known['id']}*"))) >= 1, "the id is where the run's files are"


def test_a_training_run_and_its_compressions_are_one_lineage(in_tmp, monkeypatch):
    """Offline too: the compression's run names the training's, and a training that starts from it names both."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(project="mine", save_dir=in_tmp / "training", offline=True)
    best = ModelCheckpoint(in_tmp / "training", "best")
    callbacks = [Lineage(), best, NeuronMergeCallback(ratio=0.5)]
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    module, data = ImageClassifier("lenet_300_100", 10, (1, 8, 8)), build_data("digits")
    Trainer(max_epochs=1, logger=logger, callbacks=callbacks, **quiet).fit(module, data)
    own = {"logger": "WandbLogger", "name": "mine", "id": logger.experiment.id}
    logger.experiment.finish()
    assert torch.load(in_tmp / "training" / "compressed.ckpt", weights_only=True)[RUNS_KEY] == [own]

    folder = in_tmp / "compression"
    report = run(in_tmp / "training" / "best.ckpt", folder / "out", "--method", "prune", "--ratio", "0.5")
    assert report[RUNS_KEY] == [own]
    _, found = records(folder)
    (start,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert start.run_group == own["id"] != start.run_id
    assert nested(start.config.update)[RUNS_KEY] == [own]

    monkeypatch.setenv("WANDB_MODE", "disabled")
    compressed = folder / "out" / "prune_l2-norm_0.5.ckpt"
    train.main(["--from", str(compressed), *QUICK, "--experiment", "tuned"])
    second = {"logger": "CSVLogger", "name": "tuned", "id": "0"}
    assert torch.load("runs/tuned/best.ckpt", weights_only=True)[RUNS_KEY] == [own, second]
    again = run(in_tmp / "runs" / "tuned" / "best.ckpt", in_tmp / "again", "--method", "prune", "--ratio", "0.2")
    assert again[RUNS_KEY] == [own, second]


def test_without_a_logger_there_is_no_run(in_tmp):
    train.main([*DIGITS, "--trainer.logger", "false"])
    assert torch.load("runs/lenet_300_100_digits/best.ckpt", weights_only=True)[RUNS_KEY] == []
    assert CSVLogger.__name__ not in (in_tmp / "runs" / "lenet_300_100_digits" / "config.yaml").read_text()
