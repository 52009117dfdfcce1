"""The report of where a network is sensitive: a table, a plot, a page and Markdown, from what report.json holds."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from nm_lightning.reporting.chart import element, inked
from nm_lightning.reporting.files import write_texts
from nm_lightning.reporting.page import ENVIRONMENT
from nm_lightning.reporting.results import percent

LONG = 26  # letters of a name on the plot
LABELLED = 80  # sites on the plot, at most, that all have their names


def points(report: dict) -> list[list[float]]:
    """Points of accuracy lost, for each site at each ratio."""
    before = report["baseline"]["accuracy"]
    return [[100 * (before - removal["accuracy"]) for removal in site["removals"]] for site in report["sites"]]


def print_sites(console: Console, report: dict) -> None:
    """What each site holds, and what its removals cost."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("site", no_wrap=True, overflow="ellipsis")
    for column in ("width", "parameters", "MACs", *(f"-{ratio:.0%}" for ratio in report["ratios"])):
        table.add_column(column, justify="right", no_wrap=True)
    for site, lost in zip(report["sites"], points(report), strict=True):
        shares = (f"{site[what]:.1%}" for what in ("parameters", "macs"))
        table.add_row(site["name"], str(site["width"]), *shares, *(f"{each:.2f}" for each in lost))
    console.print(table)
    console.print(said(report), soft_wrap=True)


def said(report: dict) -> str:
    """What the numbers are."""
    return (
        f"points of accuracy lost of {percent(report['baseline']['accuracy'])} %, on {report['images']} test images, "
        f"one site at a time, {report['method']}, {report['criterion']}"
    )


def figure(report: dict, ink: str = "black") -> Figure:
    """A row for each site, the first layer on top, and a dot for what each removal costs."""
    sites, lost = report["sites"], points(report)
    rows = range(len(sites))
    with inked(ink):
        sheet = Figure(figsize=(4.6, 1.1 + 0.21 * min(len(sites), LABELLED)), dpi=150, layout="constrained")
        axes = sheet.add_subplot()
        axes.hlines(rows, [min(0.0, *each) for each in lost], [max(0.0, *each) for each in lost], color="0.6", lw=0.8)
        axes.axvline(0, color="0.5", linewidth=1)
        shades = matplotlib.colormaps["plasma"]
        for place, ratio in enumerate(report["ratios"]):
            colour = shades(0.8 - 0.45 * place / max(1, len(report["ratios"]) - 1))
            axes.plot([each[place] for each in lost], rows, "o", color=colour, markersize=4.5, gid=f"removal{place}",
                      label=f"{ratio:.0%} removed")  # fmt: skip
        step = -(-len(sites) // LABELLED)
        names = [site["name"] if len(site["name"]) <= LONG else f"…{site['name'][1 - LONG :]}" for site in sites]
        axes.set_yticks(rows[::step], names[::step], fontsize=8)
        axes.set(xlabel="points of accuracy lost", ylim=(len(sites) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
        sheet.legend(*axes.get_legend_handles_labels(), fontsize=8, framealpha=0, loc="outside upper center", ncols=3)
    return sheet


def write_analysis(folder: Path, report: dict) -> None:
    """Write the plot, the page, Markdown and JSON into `folder`."""
    sheet = figure(report)
    sheet.suptitle(report["title"], fontsize=10)
    sheet.savefig(folder / "sensitivity.png")
    lost = points(report)
    values = {"report": report, "lost": lost, "worst": max(max(map(max, lost)), 1e-9), "said": said(report)}
    page = ENVIRONMENT.get_template("sensitivity.html").render(chart=element(lambda ink: figure(report, ink)), **values)
    write_texts(folder / "report", report, page, ENVIRONMENT.get_template("sensitivity.md").render(values))
