"""Weights & Biases: a run for every compression, offline without an account, and never in the way."""

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from requests.utils import get_netrc_auth

from nm_lightning.compression.recipe import Recipe
from nm_lightning.reporting.lineage import RUNS_KEY
from nm_lightning.reporting.results import best_at_each_ratio, share_removed

ROW = ("method", "criterion", "ratio", "removed", "accuracy", "parameters", "macs", "seconds", "checkpoint")
SITE = ("name", "before", "after", "removed", "error", "method", "merged", "note")


def offline_without_account() -> None:
    """Let W&B write to disk where nobody is logged in, instead of asking for an account in the middle of a run.

    `wandb sync` sends such runs later. What the user set in `WANDB_MODE` stays.
    """
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(host)):
        os.environ.setdefault("WANDB_MODE", "offline")


def log_invocation(
    report: dict,
    flags: Mapping[str, Any],
    folder: Path,
    original: Path | None = None,
    project: str = "nm-lightning",
    entity: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """One run for one call of compress.py.

    Args:
        report: what report.json holds.
        flags: of the command line, for the run's config.
        folder: with the checkpoints; the run's files go to a `wandb` folder beside it.
        original: the checkpoint that was compressed.
        project: there.
        entity: there; None for the user's own.
        tags: of the run.

    Returns:
        A line for people; empty where W&B is switched off. A failure is a line too.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return ""
    try:
        import wandb

        offline_without_account()
        known = ("title", "model", "data", "origin", "checkpoint_sha256", "versions", "device", "ranks")
        config = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
        config = {  # a sweep's cell has one of each
            name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in config.items()
        }
        recipes = [row["recipe"] for row in report["results"]]
        config |= _common([Recipe.from_dict(recipe).flat() for recipe in recipes])
        config |= {name: report[name] for name in known if report[name] is not None}
        runs = report.get(RUNS_KEY, [])
        config |= {RUNS_KEY: runs} if runs else {}
        config["recipe"] = recipes[0] if len(recipes) == 1 else recipes
        settings = wandb.Settings(silent=True, console="off")
        group = runs[0]["id"] if runs and runs[0]["logger"] == "WandbLogger" else None  # with its training, in W&B
        options = {"job_type": "compress", "group": group, "tags": list(tags), "config": config, "settings": settings}
        with wandb.init(project=project, entity=entity, name=report["title"], dir=folder.parent, **options) as run:
            log_compression(run, report, folder, original)
            where = f"{Path(run.dir).parent}, wandb sync sends it" if run.offline else run.url
        return f"W&B: {where}"
    except Exception as error:  # whatever it is, the compression is done and its files are written
        return f"W&B failed, all else is complete: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"


def _common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The value of each setting; a list of them where they differ."""
    found: dict[str, list] = defaultdict(list)
    for name, value in (item for each in settings for item in each.items()):
        found[name] += [] if value in found[name] else [value]
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def log_compression(run: Any, report: dict, folder: Path, original: Path | None = None) -> None:
    """Summary, tables, curves, histogram and artifacts of a report.

    Args:
        run: a W&B run, as `WandbLogger.experiment` is.
        report: what report.json holds.
        folder: with the checkpoints that the report names.
        original: the checkpoint that was compressed.
    """
    import wandb

    rows = report["results"]
    run.summary.update(summary(report))
    run.log({"results": wandb.Table(list(ROW), [[row[name] for name in ROW] for row in rows])}, commit=False)
    sites = [
        [row["method"], row["criterion"], share_removed(row), *(_site(site)[name] for name in SITE)]
        for row in rows
        for site in row["sites"]
    ]
    run.log({"sites": wandb.Table(["of method", "of criterion", "of ratio", *SITE], sites)}, commit=False)
    for what in ("accuracy", "parameters", "macs"):
        if rows[0][what] is not None:
            lines = defaultdict(list)
            for row in rows:
                lines[f"{row['method']}, {row['criterion']}"].append((share_removed(row), row[what]))
            xs, ys = zip(*(zip(*sorted(points), strict=True) for points in lines.values()), strict=True)
            curve = wandb.plot.line_series(
                [list(x) for x in xs], [list(y) for y in ys], list(lines), f"{what} over ratio", "share removed"
            )
            run.log({f"curves/{what}": curve}, commit=False)
    counts = [sum(column) for column in zip(*(row["similarity"] for row in rows), strict=True)]
    if counts:
        edges = [-1 + 2 * step / len(counts) for step in range(len(counts) + 1)]
        run.log({"similarity": wandb.Histogram(np_histogram=(counts, edges))}, commit=False)
    run.log({})

    offline, sha256 = run.offline, report["checkpoint_sha256"]
    label = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in report["title"])
    if original is not None:
        first = wandb.Artifact(f"{label}-original", "model", metadata={"sha256": sha256, "origin": report["origin"]})
        first.add_file(str(original))
        if offline:
            run.log_artifact(first)
        else:
            run.use_artifact(first)
    for row in rows:
        about = {name: row[name] for name in ROW} | {"original_sha256": sha256}
        stem = Path(row["checkpoint"]).stem
        artifact = wandb.Artifact(f"{label}-{stem}", "model", metadata=about)
        artifact.add_file(str(folder / row["checkpoint"]))
        run.log_artifact(artifact)


def summary(report: dict) -> dict[str, float]:
    """The single ratio's best row as `accuracy/after`, ...; of several ratios `accuracy/after/<ratio>`, ..."""
    before, best = report["baseline"], best_at_each_ratio(report)
    found = {"accuracy/before": before["accuracy"], "parameters/before": before["parameters"]}
    found["macs/before"] = before["macs"]
    found |= {f"latency/before/batch_{entry['batch']}": entry["median"] for entry in before["latency"]}
    found |= {f"{name}/before": value for name, value in before["logged"].items()}
    for ratio, row in best.items():
        end = f"/{ratio}" if len(best) > 1 else ""
        found |= {f"{name}/after{end}": value for name, value in row["logged"].items()}
        found |= {f"{what}/after{end}": row[what] for what in ("accuracy", "parameters", "macs")}
        if row["accuracy"] is not None:
            found[f"accuracy/drop{end}"] = before["accuracy"] - row["accuracy"]
        found[f"compression/seconds{end}"] = row["seconds"]
        found |= {f"latency/after/batch_{entry['batch']}{end}": entry["median"] for entry in row["latency"]}
    return {name: value for name, value in found.items() if value is not None}


def _site(site: dict) -> dict:
    return site | {"removed": 1 - site["after"] / site["before"]}


def warn_instead(work: Any, *arguments: Any) -> None:
    """Call `work`; an error in it becomes a warning."""
    try:
        work(*arguments)
    except Exception as error:
        warnings.warn(f"W&B failed, all else is complete: {error}", stacklevel=2)
