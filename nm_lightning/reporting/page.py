"""report.html, one self-contained page, and report.md, both from what report.json holds."""

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from nm_lightning.compression.recipe import Recipe
from nm_lightning.compression.report import by_reason, several
from nm_lightning.errors import InputError
from nm_lightning.reporting.chart import single, svg
from nm_lightning.reporting.results import exported, featured, percent, short

ENVIRONMENT = Environment(
    loader=PackageLoader("nm_lightning.reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def as_callback(row: dict) -> str:
    """A row's recipe as the callback of a configuration of train.py; as it stands, where a part is not known here."""
    try:
        recipe = Recipe.from_dict(row["recipe"])
    except InputError:
        return yaml.safe_dump({"recipe": row["recipe"]}, sort_keys=False).rstrip()
    values = {name: value for name, value in recipe.flat().items() if value is not None}  # a preset has no say left
    arguments = {"method": recipe.method.label, "criterion": recipe.criterion.label, **values}
    callback = {"class_path": "nm_lightning.callbacks.NeuronMergeCallback", "init_args": arguments}
    return yaml.safe_dump({"trainer": {"callbacks": [callback]}}, sort_keys=False).rstrip()


ENVIRONMENT.filters |= {
    "as_callback": as_callback,
    "exported": exported,
    "percent": percent,
    "short": short,
    "by_reason": by_reason,
    "several": several,
}


def html(report: dict) -> str:
    """A page that needs no network: headline, curve, results, layers, and how to repeat it."""
    return ENVIRONMENT.get_template("report.html").render(
        report=report, top=featured(report), chart=svg(report), bars=single(report)
    )


def markdown(report: dict) -> str:
    """Headline, results and layers, to paste into a pull request."""
    return ENVIRONMENT.get_template("report.md").render(report=report, top=featured(report))
