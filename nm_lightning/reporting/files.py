"""The files of a report: JSON and CSV for programs, a plot, a page, and Markdown for a pull request."""

import csv
import json
from pathlib import Path

from nm_lightning.reporting import page
from nm_lightning.reporting.chart import png

COLUMNS = ("method", "criterion", "ratio", "removed", "accuracy", "parameters", "macs", "seconds", "checkpoint")


def write_files(folder: Path, report: dict) -> None:
    """Write the five files of a grid into `folder`; the plot only where there are accuracies."""
    with (folder / "results.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(report["results"])
    if report["baseline"]["accuracy"] is not None:
        png(folder / "accuracy.png", report)
    write_report(folder / "report", report)


def write_report(stem: Path, report: dict) -> None:
    """Write `<stem>.html`, `<stem>.md` and `<stem>.json`, each by rename."""
    write_texts(stem, report, page.html(report), page.markdown(report))


def write_texts(stem: Path, report: dict, html: str, markdown: str) -> None:
    """Write a report's page, its Markdown and itself, each by rename."""
    for ending, text in ((".html", html), (".md", markdown), (".json", json.dumps(report, indent=2) + "\n")):
        draft = stem.with_name(f".{stem.name}{ending}")
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
        draft.replace(stem.with_name(stem.name + ending))
