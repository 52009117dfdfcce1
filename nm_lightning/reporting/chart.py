"""The one chart: accuracy over the share of neurons removed, as a picture and inside the page."""

import io
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nm_lightning.reporting.results import percent, share_removed

COLOURS = {"prune": "#c8503c", "merge": "#2f6fb4", "reconstruct": "#2e8b57", "fold": "#b07a16"}  # as on the page
OTHER = "#7a58a8"
SPAN = 2.0  # points of accuracy that it shows at least
INK = "#010203"  # what becomes the page's own colour of text


def figure(report: dict, ink: str = "black") -> Figure:
    """A line for each method and criterion, over the original's accuracy; where each has one point, a bar."""
    lines, before = curves(report), report["baseline"]["accuracy"]
    with inked(ink):
        if single(report):
            return _bars({", ".join(line): points[0][1] for line, points in lines.items()}, 100 * before, lines)
        styles = dict(zip(dict.fromkeys(criterion for _, criterion in lines), ("-", "--", ":", "-."), strict=False))
        sheet = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = sheet.add_subplot()
        axes.axhline(100 * before, color="0.5", linewidth=1, label=f"original ({percent(before)})")
        for number, ((method, criterion), points) in enumerate(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), styles.get(criterion, "-"), color=COLOURS.get(method, OTHER),
                      marker="o", markersize=4, label=f"{method}, {criterion}", gid=f"curve{number}")  # fmt: skip
        axes.set(xlabel="share of neurons removed", ylabel="test accuracy (%)")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - SPAN), high)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0)
    return sheet


def _bars(accuracies: dict[str, float], before: float, lines: Iterable[tuple[str, str]]) -> Figure:
    """The original's bar, and one for each line's only point, from 0."""
    sheet = Figure(figsize=(5, 1.2 + 0.35 * len(accuracies)), dpi=150, layout="constrained")
    axes = sheet.add_subplot()
    colours = ["0.6", *(COLOURS.get(method, OTHER) for method, _ in lines)]
    bars = axes.barh(["original", *accuracies], [before, *accuracies.values()], 0.65, color=colours)
    for number, bar in enumerate(bars):
        bar.set_gid(f"bar{number}")
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.set(xlabel="test accuracy (%)", xlim=(0, 118), xticks=range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return sheet


def curves(report: dict) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By method and criterion, the share of neurons removed and the accuracy in percent of each row."""
    lines = defaultdict(list)
    for row in report["results"]:
        lines[row["method"], row["criterion"]].append((share_removed(row), 100 * row["accuracy"]))
    return lines


def single(report: dict) -> bool:
    """Whether each method and criterion has one result."""
    rows = [(row["method"], row["criterion"]) for row in report["results"]]
    return len(rows) == len(set(rows))


def png(path: Path, report: dict) -> None:
    """Write the chart as a picture, with its title."""
    sheet = figure(report)
    sheet.axes[0].set_title(report.get("title", ""))
    sheet.savefig(path)


def svg(report: dict) -> str:
    """The chart as an element of a page; empty where there are no accuracies."""
    return "" if report["baseline"]["accuracy"] is None else element(lambda ink: figure(report, ink))


def inked(ink: str) -> AbstractContextManager:
    """Draw axes and text in a colour."""
    what = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    return matplotlib.rc_context(dict.fromkeys(what, ink))


def element(draw: Callable[[str], Figure]) -> str:
    """A figure as an element of a page, what `draw` makes in its ink in the page's colour of text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nm-lightning"}):
        draw(INK).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2].replace(INK, "currentColor")
