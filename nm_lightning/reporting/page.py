"""report.html, one self-contained page, and report.md, both from what report.json holds."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from nm_lightning.compression.report import by_reason, several
from nm_lightning.reporting.chart import single, svg
from nm_lightning.reporting.results import featured, percent, short

ENVIRONMENT = Environment(
    loader=PackageLoader("nm_lightning.reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"percent": percent, "short": short, "by_reason": by_reason, "several": several}


def html(report: dict) -> str:
    """A page that needs no network: headline, curve, results, layers, and how to repeat it."""
    return ENVIRONMENT.get_template("report.html").render(
        report=report, top=featured(report), chart=svg(report), bars=single(report)
    )


def markdown(report: dict) -> str:
    """Headline, results and layers, to paste into a pull request."""
    return ENVIRONMENT.get_template("report.md").render(report=report, top=featured(report))
