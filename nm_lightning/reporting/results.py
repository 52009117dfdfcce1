"""The rows of a grid of compressions, as a table, as JSON and CSV, and as a plot of accuracy over ratio."""

import csv
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass
class Result:
    """One cell of the grid.

    Attributes:
        method: prune, merge, ...
        criterion: which neurons stayed.
        ratio: share of neurons removed at each site; None where widths were given.
        accuracy: a fraction of the test set.
        parameters: of the compressed network.
        macs: multiply-accumulates for one image.
        seconds: of the compression alone.
        widths: survivors by site.
        notes: what a reader should know.
        checkpoint: the file's name in the same folder.
        removed: share of all the sites' neurons that is gone.
    """

    method: str
    criterion: str
    ratio: float | None
    accuracy: float
    parameters: int
    macs: int
    seconds: float
    widths: dict[str, int]
    notes: list[str]
    checkpoint: str
    removed: float


@dataclass
class Baseline:
    """The original network: accuracy (a fraction), parameters, and MACs for one image."""

    accuracy: float
    parameters: int
    macs: int


def print_table(console: Console, baseline: Baseline, results: list[Result]) -> None:
    """Accuracy before and after, size and cost of every result."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("method", "criterion", "ratio"):
        table.add_column(column, no_wrap=True)
    for column in ("before %", "after %", "parameters", "MACs", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    before = f"{100 * baseline.accuracy:.2f}"
    table.add_row("original", "", "", before, "", _short(baseline.parameters), _short(baseline.macs), "")
    for result in results:
        table.add_row(
            result.method,
            result.criterion,
            "" if result.ratio is None else f"{result.ratio:g}",
            before,
            f"{100 * result.accuracy:.2f}",
            f"{_short(result.parameters)} {result.parameters / baseline.parameters:4.0%}",
            f"{_short(result.macs)} {result.macs / baseline.macs:4.0%}",
            f"{result.seconds:.2f}",
        )
    console.print(table)


def _short(number: int) -> str:
    """Three digits and a unit, such as `266k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def write_files(folder: Path, about: dict, baseline: Baseline, results: list[Result]) -> None:
    """Write report.json, results.csv and accuracy.png into `folder`."""
    report = {**about, "baseline": asdict(baseline), "results": [asdict(result) for result in results]}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = ("method", "criterion", "ratio", "removed", "accuracy", "parameters", "macs", "seconds", "checkpoint")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(result, column) for column in columns] for result in results)
    plot(folder / "accuracy.png", about.get("title", ""), baseline, results)


def plot(path: Path, title: str, baseline: Baseline, results: list[Result]) -> None:
    """Accuracy over the share of neurons removed, a line for each method and criterion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = defaultdict(list)
    for result in results:
        share = result.removed if result.ratio is None else result.ratio
        lines[result.method, result.criterion].append((share, 100 * result.accuracy))
    styles = dict(zip(dict.fromkeys(result.criterion for result in results), ("-", "--", ":", "-."), strict=False))
    colours = {"prune": "C3", "merge": "C0", "reconstruct": "C2"}
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes.axhline(100 * baseline.accuracy, color="0.5", linewidth=1, label=f"original ({100 * baseline.accuracy:.2f})")
    for (method, criterion), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), styles.get(criterion, "-"), color=colours.get(method, "C4"),
                  marker="o", markersize=4, label=f"{method}, {criterion}")  # fmt: skip
    axes.set(xlabel="share of neurons removed", ylabel="test accuracy (%)", title=title)
    if len({share for points in lines.values() for share, _ in points}) == 1:
        axes.set_xlim(0, 1)  # around a single point the axis would be a hair's breadth
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
