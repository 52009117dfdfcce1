"""The paper's settings for its networks and data sets: `configs/compress/<network>_<data>.yaml`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CONFIGS = next(place for place in (HERE / "configs", HERE.parent / "configs") if place.is_dir())  # in a wheel, or not
SAYS_HOW_MUCH = ("ratio", "widths", "sites", "target_parameters", "target_macs", "target_latency", "budget")


def preset(model: str, data: str) -> dict[str, Any]:
    """The paper's settings for a network on a data set; none where it has none.

    >>> preset("lenet_300_100", "fashion_mnist")
    {'rounding': 'nearest', 'threshold': 0.45}
    """
    file = CONFIGS / "compress" / f"{model.replace('/', '_')}_{data}.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def filled(given: Mapping[str, Any], model: str, data: str) -> dict[str, Any]:
    """The settings that were given, and the preset's for the others.

    Its widths count only where nothing that was given says how much or which sites.
    """
    own = preset(model, data)
    if any(name in given for name in SAYS_HOW_MUCH):
        own.pop("widths", None)
    return {**own, **given}
