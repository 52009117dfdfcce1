"""report.html, one self-contained page, and report.md, both from what report.json holds."""

from collections import defaultdict

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.ticker import MaxNLocator

from nm_lightning.reporting.results import featured, percent, share_removed, short

SPAN = 2.0  # points of accuracy that the chart shows at least
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 480, 300, 44, 40, 12  # of the chart, in its own units
ENVIRONMENT = Environment(
    loader=PackageLoader("nm_lightning.reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"percent": percent, "short": short}


def html(report: dict) -> str:
    """A page that needs no network: headline, curve, results, layers, and how to repeat it."""
    return ENVIRONMENT.get_template("report.html").render(report=report, top=featured(report), chart=chart(report))


def markdown(report: dict) -> str:
    """Headline, results and layers, to paste into a pull request."""
    return ENVIRONMENT.get_template("report.md").render(report=report, top=featured(report))


def chart(report: dict) -> dict | None:
    """Where the lines of accuracy over the share removed lie on a sheet of `WIDTH` by `HEIGHT`; None without labels."""
    before = report["baseline"]["accuracy"]
    if before is None:
        return None
    series = defaultdict(list)
    for row in report["results"]:
        series[row["method"], row["criterion"]].append((share_removed(row), 100 * row["accuracy"]))
    shares = [share for points in series.values() for share, _ in points]
    heights = [100 * before, *(height for points in series.values() for _, height in points)]
    across = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, max([0.1, *shares]))
    up = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(min(*heights, max(heights) - SPAN), max(heights))

    def x(share: float) -> float:
        return round(LEFT + (WIDTH - LEFT - MARGIN) * (share - across[0]) / (across[-1] - across[0]), 1)

    def y(height: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - MARGIN) * (height - up[0]) / (up[-1] - up[0]), 1)

    criteria = list(dict.fromkeys(criterion for _, criterion in series))
    lines = [
        {
            "method": method,
            "label": f"{method}, {criterion}" if len(criteria) > 1 else method,
            "dash": criteria.index(criterion),
            "points": [
                {"x": x(share), "y": y(height), "says": f"{method}, {criterion}, {share:.3g}: {height:.2f} %"}
                for share, height in sorted(points)
            ],
        }
        for (method, criterion), points in series.items()
    ]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - MARGIN,
        "floor": HEIGHT - BOTTOM,
        "across": [(x(tick), f"{tick:.3g}") for tick in across],
        "up": [(y(tick), f"{tick:.3g}") for tick in up],
        "before": y(100 * before),
        "lines": lines,
    }
