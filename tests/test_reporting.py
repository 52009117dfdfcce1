"""What people look at: the page in a browser, the W&B run read back from its file, sweeps and the dashboard."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

import compress
from nm_lightning.cli import dashboard
from nm_lightning.cli.sweeps import flags_of
from nm_lightning.errors import InputError
from nm_lightning.reporting.page import html, markdown
from nm_lightning.reporting.results import best_at_each_ratio, featured
from nm_lightning.reporting.weights_and_biases import log_invocation, summary

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LeNet trained on scikit-learn's digits, as a checkpoint."""
    import train

    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train.main(["--config", str(ROOT / "configs" / "lenet_300_100_digits.yaml"), "--trainer.max_epochs", "3"])
    return place / "runs" / "lenet_300_100_digits" / "best.ckpt"


GRID = ["--method", "prune", "merge", "reconstruct", "--criterion", "l1-norm", "l2-norm", "--ratio", "0.5", "0.8"]


def run(trained, folder, *flags):
    compress.main(["--checkpoint", str(trained), "--device", "cpu", "--output", str(folder), *flags])
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def grid(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "out"
    return folder, run(trained, folder, *GRID, "--latency")


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


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(size, scheme, grid, browser):
    folder, report = grid
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{folder / 'report.html'}")
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{folder / 'report.html'}"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    drawn = page.evaluate("(e => [e.width, e.height])(document.querySelector('figure svg').getBoundingClientRect())")
    assert min(drawn) > 150
    assert page.locator("figure > svg circle").count() == len(report["results"]) == 12
    assert page.locator("figure > svg polyline").count() == 6
    assert page.locator("details[open] .layer").count() == 3  # the head and two layers
    text = page.inner_text("main")
    for row in report["results"]:
        assert f"{100 * row['accuracy']:.2f}" in text
    assert report["command"] in text and report["versions"]["torch"] in text
    back = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (sum(back) < 150) == (scheme == "dark")
    page.close()


def test_what_is_shown_first():
    def row(accuracy, parameters, ratio):
        return {"accuracy": accuracy, "parameters": parameters, "ratio": ratio, "removed": 0}

    before = {"accuracy": 0.9}
    rows = [row(0.895, 50, 0.5), row(0.893, 20, 0.8), row(0.892, 20, 0.8), row(0.7, 10, 0.9)]
    assert featured({"baseline": before, "results": rows}) is rows[1]
    assert featured({"baseline": before, "results": rows[3:]}) is rows[3]
    assert (
        featured({"baseline": {"accuracy": None}, "results": [row(None, 5, 0.1), row(None, 4, 0.2)]})["parameters"] == 4
    )
    assert best_at_each_ratio({"results": rows}) == {"0.5": rows[0], "0.8": rows[1], "0.9": rows[3]}


def test_a_page_of_a_network_with_strange_names(grid):
    _, report = grid
    report = json.loads(json.dumps(report))
    report["title"] = "<script>alert(1)</script>"
    report["results"][0]["sites"][0]["name"] = 'a"b<c'
    for row in (report["baseline"], *report["results"]):
        row["accuracy"] = None
    page = html(report)
    assert "<script>" not in page and 'a"b<c' not in page
    assert "accuracy" not in markdown(report).splitlines()[0]


def test_markdown_has_the_numbers(grid):
    folder, report = grid
    text = (folder / "report.md").read_text()
    for row in report["results"]:
        assert f"| {row['method']} | {row['criterion']} | {row['ratio']:g} | {100 * row['accuracy']:.2f} |" in text


def test_quiet_and_json(trained, tmp_path, capsys):
    run(trained, tmp_path / "quiet", "--ratio", "0.5", "--quiet")
    assert capsys.readouterr().out == ""
    report = run(trained, tmp_path / "json", "--ratio", "0.5", "--json")
    assert json.loads(capsys.readouterr().out) == report


def test_the_terminal_says_little(trained, tmp_path, capsys):
    run(trained, tmp_path / "out", *GRID)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 12 + 3 + 15  # a line for each result, the table's head and original, 15 more
    assert max(map(len, lines[3:])) <= 80 + len(str(tmp_path))
    assert "\x1b" not in "".join(lines)


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
