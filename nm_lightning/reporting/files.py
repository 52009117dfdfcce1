"""The files of a report: JSON and CSV for programs, a plot, a page, and Markdown for a pull request."""

import csv
import json
from collections import defaultdict
from pathlib import Path

from nm_lightning.reporting.page import html, markdown
from nm_lightning.reporting.results import percent, share_removed

COLUMNS = ("method", "criterion", "ratio", "removed", "accuracy", "parameters", "macs", "seconds", "checkpoint")


def write_files(folder: Path, report: dict) -> None:
    """Write the five files of a grid into `folder`; the plot only where there are accuracies."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["results"])
    if report["baseline"]["accuracy"] is not None:
        plot(folder / "accuracy.png", report)
    write_report(folder / "report", report)


def write_report(stem: Path, report: dict) -> None:
    """Write `<stem>.html`, `<stem>.md` and `<stem>.json`, each by rename."""
    for ending, text in (
        (".html", html(report)),
        (".md", markdown(report)),
        (".json", json.dumps(report, indent=2) + "\n"),
    ):
        draft = stem.with_name(f".{stem.name}{ending}")
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        draft.replace(stem.with_name(stem.name + ending))


def plot(path: Path, report: dict) -> None:
    """Accuracy over the share of neurons removed, a line for each method and criterion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines, before = defaultdict(list), report["baseline"]["accuracy"]
    for row in report["results"]:
        lines[row["method"], row["criterion"]].append((share_removed(row), 100 * row["accuracy"]))
    styles = dict(zip(dict.fromkeys(criterion for _, criterion in lines), ("-", "--", ":", "-."), strict=False))
    colours = {"prune": "C3", "merge": "C0", "reconstruct": "C2"}
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes.axhline(100 * before, color="0.5", linewidth=1, label=f"original ({percent(before)})")
    for (method, criterion), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), styles.get(criterion, "-"), color=colours.get(method, "C4"),
                  marker="o", markersize=4, label=f"{method}, {criterion}")  # fmt: skip
    axes.set(xlabel="share of neurons removed", ylabel="test accuracy (%)", title=report.get("title", ""))
    if len({share for points in lines.values() for share, _ in points}) == 1:
        axes.set_xlim(0, 1)  # around a single point the axis would be a hair's breadth
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
