"""The one chart: accuracy over the share of neurons removed, as a picture and inside the page."""

import io
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from nm_lightning.reporting.results import percent, share_removed

COLOURS = {"prune": "C3", "merge": "C0", "reconstruct": "C2"}
SPAN = 2.0  # points of accuracy that it shows at least
INK = "#010203"  # what becomes the page's own colour of text


def figure(report: dict, ink: str = "black") -> Figure:
    """A line for each method and criterion, over the original's accuracy."""
    lines, before = defaultdict(list), report["baseline"]["accuracy"]
    for row in report["results"]:
        lines[row["method"], row["criterion"]].append((share_removed(row), 100 * row["accuracy"]))
    styles = dict(zip(dict.fromkeys(criterion for _, criterion in lines), ("-", "--", ":", "-."), strict=False))
    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context(colours):
        sheet = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        axes = sheet.add_subplot()
        axes.axhline(100 * before, color="0.5", linewidth=1, label=f"original ({percent(before)})")
        for number, ((method, criterion), points) in enumerate(lines.items()):
            axes.plot(*zip(*sorted(points), strict=True), styles.get(criterion, "-"), color=COLOURS.get(method, "C4"),
                      marker="o", markersize=4, label=f"{method}, {criterion}", gid=f"curve{number}")  # fmt: skip
        axes.set(xlabel="share of neurons removed", ylabel="test accuracy (%)")
        one = len({share for points in lines.values() for share, _ in points}) == 1
        axes.set_xlim(0, 1 if one else None)  # around a single point the axis would be a hair's breadth
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - SPAN), high)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0)
    return sheet


def png(path: Path, report: dict) -> None:
    """Write the chart as a picture, with its title."""
    sheet = figure(report)
    sheet.axes[0].set_title(report.get("title", ""))
    sheet.savefig(path)


def svg(report: dict) -> str:
    """The chart as an element of a page, in the page's colour of text; empty where there are no accuracies."""
    if report["baseline"]["accuracy"] is None:
        return ""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nm-lightning"}):
        figure(report, INK).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2].replace(INK, "currentColor")
