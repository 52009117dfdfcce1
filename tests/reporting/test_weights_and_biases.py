"""The W&B run, read back from its file."""

import json
import time

import pytest

from nm_lightning.reporting.weights_and_biases import log_invocation, summary
from tests.cli import run


def records(folder):
    """All records of the one offline run, by wandb's own messages.

    The file is a LevelDB log: blocks of 32 KiB, of pieces that have 4 bytes checksum, 2 of length, and one that says
    whether a piece is a whole record (1), the first (2), one in between (3) or the last (4). wandb 0.31 reads it in Go.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    time.sleep(3)  # its service writes the end after the run is finished
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, position, found, whole = path.read_bytes(), 7, [], b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
    return path.parent, found


def nested(items):
    found = {}
    for item in items:
        found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


@pytest.mark.parametrize("ratios", [["0.5"], ["0.5", "0.8"]])
def test_an_offline_run_holds_everything(ratios, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--method", "prune", "merge", "--ratio", *ratios, "--latency", "--wandb_tags", "one", "two"]
    report = run(trained, tmp_path / "out", *flags, "--wandb_project", "mine", "--wandb_entity", "us")
    files, found = records(tmp_path)
    (start,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (start.project, start.entity, list(start.tags), start.job_type) == ("mine", "us", ["one", "two"], "compress")
    config = nested(start.config.update)
    assert config["calibration_size"] == 1024 and config["method"] == ["prune", "merge"]
    assert config["checkpoint_sha256"] == report["checkpoint_sha256"] and len(report["checkpoint_sha256"]) == 64
    assert config["versions"] == report["versions"] and "torch" in config["versions"]

    summaries, history = {}, {}
    for record in found:
        summaries |= nested(record.summary.update)
        history |= nested(record.history.item)
    for name, value in summary(report).items():
        assert summaries[name] == pytest.approx(value), name
    best = {ratio: max((r for r in report["results"] if r["ratio"] == float(ratio)), key=lambda r: r["accuracy"])
            for ratio in ratios}  # fmt: skip
    for ratio, row in best.items():
        end = "" if len(ratios) == 1 else f"/{ratio}"
        assert summaries[f"accuracy/after{end}"] == row["accuracy"]
        assert summaries[f"accuracy/drop{end}"] == pytest.approx(report["baseline"]["accuracy"] - row["accuracy"])
        assert summaries[f"parameters/after{end}"] == row["parameters"]
        assert summaries[f"macs/after{end}"] == row["macs"]
        assert summaries[f"compression/seconds{end}"] == row["seconds"]
        assert summaries[f"latency/after/batch_128{end}"] == row["latency"][1]["median"]

    def table(name):
        content = json.loads((files / "files" / history[f"{name}/path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    rows, sites = table("results"), table("sites")
    assert rows == [{name: row[name] for name in rows[0]} for row in report["results"]]
    assert len(sites) == 2 * len(report["results"])
    assert sites[0]["name"] == "ip1" and sites[0]["removed"] == 0.5 and sites[0]["after"] == 150
    for what in ("accuracy", "parameters", "macs"):
        drawn = {(row["lineKey"], row["step"]): row["lineVal"] for row in table(f"curves/{what}_table")}
        for row in report["results"]:
            assert drawn[f"{row['method']}, {row['criterion']}", row["ratio"]] == row[what]
    assert sum(history["similarity/values"]) == sum(sum(row["similarity"]) for row in report["results"]) > 0

    artifacts = {record.artifact.name: record.artifact for record in found if record.artifact.type == "model"}
    assert len(artifacts) == 1 + len(report["results"])
    for name, artifact in artifacts.items():
        known = json.loads(artifact.metadata)
        hashed = known["sha256"] if name.endswith("original") else known["original_sha256"]
        assert hashed == report["checkpoint_sha256"]


def test_nothing_that_befalls_wandb_stops_a_run(trained, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**settings):
        raise wandb.errors.CommError("the server is on fire")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", refuse)
    run(trained, tmp_path / "out", "--ratio", "0.5")
    assert "W&B failed, all else is complete: the server is on fire" in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    report = run(trained, tmp_path / "out", "--ratio", "0.5")
    assert "W&B failed" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert log_invocation(report, {}, tmp_path / "out") == ""
