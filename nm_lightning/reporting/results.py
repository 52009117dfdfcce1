"""What a compression, or a grid of them, has found: rows for a table, and one dictionary for every kind of report."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from nm_lightning.measure import Baseline, Result

PACKAGES = ("nm-lightning", "torch", "torchvision", "pytorch-lightning")
ONE_POINT = 0.01  # of accuracy: what a compression may cost before it is a trade


def assemble(about: dict, baseline: Baseline, results: Sequence[Result]) -> dict:
    """All of it as plain dictionaries and lists, which is what report.json holds."""
    rows = [asdict(result) for result in results]
    return {**about, "versions": installed(), "baseline": asdict(baseline), "results": rows}


def installed() -> dict[str, str]:
    """The versions of the packages that matter."""
    found = {entry.name for entry in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in found}


def featured(report: dict) -> dict:
    """The row to show first: the smallest network within a point of the original, else the most accurate one."""
    rows, before = report["results"], report["baseline"]["accuracy"]
    good = [row for row in rows if before is None or before - row["accuracy"] <= ONE_POINT]
    if good:
        return min(good, key=lambda row: (row["parameters"], -(row["accuracy"] or 0)))
    return max(rows, key=lambda row: row["accuracy"])


def best_at_each_ratio(report: dict) -> dict[str, dict]:
    """The most accurate row of each ratio, ascending; widths and targets count as one ratio, the share removed."""
    found: dict[float, dict] = {}
    for row in report["results"]:
        share = share_removed(row)
        if share not in found or (row["accuracy"] or 0) > (found[share]["accuracy"] or 0):
            found[share] = row
    return {f"{share:.3g}": found[share] for share in sorted(found)}


def share_removed(row: dict) -> float:
    """A row's place on a plot's axis."""
    return row["removed"] if row["ratio"] is None else row["ratio"]


def print_table(console: Console, report: dict) -> None:
    """Accuracy before and after, size and cost of every result."""
    baseline, timed = report["baseline"], bool(report["baseline"]["latency"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("method", "criterion", "ratio"):
        table.add_column(column, no_wrap=True)
    columns = [*(["accuracy %"] if timed else ["before %", "after %"]), "parameters", "MACs"]
    columns += [*(["ms/image"] if timed else []), "seconds"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    def latency(row: dict) -> list[str]:
        return [f"{row['latency'][0]['median']:.2f}"] if timed else []

    before, parameters, macs = percent(baseline["accuracy"]), baseline["parameters"], baseline["macs"]
    first = ["original", "", "", before, *([] if timed else [""])]
    table.add_row(*first, short(parameters), short(macs), *latency(baseline), "")
    for row in report["results"]:
        table.add_row(
            row["method"],
            row["criterion"],
            "" if row["ratio"] is None else f"{row['ratio']:g}",
            *([] if timed else [before]),  # a terminal has 80 columns
            percent(row["accuracy"]),
            f"{short(row['parameters'])} {row['parameters'] / parameters:4.0%}",
            f"{short(row['macs'])} {row['macs'] / macs:4.0%}",
            *latency(row),
            f"{row['seconds']:.2f}",
        )
    console.print(table)
    files = exported(report)
    if files:
        table = Table("file, by onnxruntime", "MB", "accuracy %", "ms/image", box=box.SIMPLE_HEAD, pad_edge=False)
        for entry in files:
            size, each = f"{entry['bytes'] / 1e6:.2f}", f"{entry['latency'][0]['median']:.2f}"
            table.add_row(entry["file"], size, percent(entry["accuracy"]), each)
        console.print(table)


def exported(report: dict) -> list[dict]:
    """The files that were measured, a row each."""
    return [entry for row in report["results"] for entry in row["exported"]]


def percent(fraction: float | None) -> str:
    """Two decimals.

    >>> percent(0.5)
    '50.00'
    """
    return "" if fraction is None else f"{100 * fraction:.2f}"


def short(number: float) -> str:
    """Three digits and a unit.

    >>> short(266_610)
    '267k'
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
