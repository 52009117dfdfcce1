"""The recipe's settings as flags of a command line.

`settings.json` beside this file says them as the settings themselves do, so that `--help` and bad flags are answered
before torch is imported; `python docs/flags.py` writes it.
"""

import argparse
import json
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nm_lightning.cli.errors import fail

if typing.TYPE_CHECKING:
    from nm_lightning.compression import Recipe

TABLE = Path(__file__).with_name("settings.json")
SOURCE = ("checkpoint", "model", "data", "data_dir", "weights", "input_key", "label_key")
SOURCE += ("calibration", "latency", "device")
SEVERAL = ("ratio", "widths", "sites")  # a flag of several words
ALIASES = {"lamda": ("--lambda",)}
WORDS = {"bool": None, "float": float, "int": int, "str": str}  # the type of one word; a bool has none


def described() -> dict[str, Any]:
    """The settings themselves, for the table: names of methods and criteria, and each setting's help and type."""
    from nm_lightning.compression.recipe import settings
    from nm_lightning.compression.settings import Criterion, Method, default_of

    found = {}
    for name, own in settings().items():
        shown = "" if default_of(own) is None or own.type is bool else f" ({default_of(own)})"
        found[name] = {"help": own.metadata["help"] + shown, "type": _word(own.type)}
    return {"method": list(Method.known), "criterion": list(Criterion.known), "settings": found}


def known() -> dict[str, Any]:
    """The table; what the settings say where they are imported anyway, the user's own among them."""
    imported = "nm_lightning.compression.recipe" in sys.modules
    return described() if imported else json.loads(TABLE.read_text())


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, its help and type from the setting itself; `None` where it is not given."""
    for name, own in known()["settings"].items():
        options: dict[str, Any] = {"default": None, "help": own["help"]}
        if own["type"] == "bool":
            options["action"] = "store_true"
        else:
            options |= {"type": WORDS[own["type"]], "nargs": "+" if name in SEVERAL else None}
        parser.add_argument(f"--{name}", *ALIASES.get(name, ()), **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by name."""
    found = {name: getattr(args, name, None) for name in known()["settings"]}
    given = {name: value for name, value in found.items() if value is not None}
    if "widths" in given:
        given["widths"] = parse_widths(given["widths"])
    return given


def _word(kind: Any) -> str:
    """The type of one word of a value."""
    united = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((kind.__name__ for kind in (bool, float, int) if kind in united), "str")


def parse_widths(words: Sequence[str]) -> list[int] | dict[str, int]:
    """`["32", "64"]` to a list, `["conv1=32"]` to a mapping."""
    named = ["=" in word for word in words]
    if any(named) != all(named):
        fail(f"--widths {' '.join(words)}: give integers in order, or site=width throughout, not both")
    try:
        if all(named):
            return {site: int(width) for site, _, width in (word.rpartition("=") for word in words)}
        return [int(word) for word in words]
    except ValueError:
        fail(f"--widths {' '.join(words)}: give whole numbers")


def dotted(words: Sequence[str], groups: Sequence[str]) -> dict[str, dict[str, str]]:
    """Flags of constructors, `--model.width 32` or `--model.width=32`, by group and name; exits on any other.

    >>> dotted(["--model.width", "32", "--data.root=images", "--model.wide"], ["model", "data"])
    {'model': {'width': '32', 'wide': 'true'}, 'data': {'root': 'images'}}
    """
    found: dict[str, dict[str, str]] = {group: {} for group in groups}
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        group, _, name = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not name or group not in groups:
            fail(f"unrecognized arguments: {' '.join([flag + equals + value, *rest])} (see --help)")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found[group][name] = value
    return found


def source_words(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The flags that say what is compressed and how it is measured, as far as they were given."""
    given = [name for name in SOURCE if getattr(args, name) not in (None, parser.get_default(name))]
    own = [(f"{group}.{name}", value) for group, values in args.arguments.items() for name, value in values.items()]
    return [
        word for name, value in [*((name, getattr(args, name)) for name in given), *own] for word in _flag(name, value)
    ]


def recipe_words(recipe: "Recipe", preset: Collection[str] = ()) -> list[str]:
    """The flags that ask for a recipe; defaults are left out, but for what a preset would say otherwise."""
    from nm_lightning.compression.recipe import settings
    from nm_lightning.compression.settings import default_of

    values, fields = recipe.flat(), settings()
    if isinstance(values.get("widths"), Sequence):
        values.pop("ratio", None)  # it has no say
    words = ["--method", recipe.method.label, "--criterion", recipe.criterion.label]
    for name, value in values.items():
        if name == "ratio" or name in preset or value != default_of(fields[name]):
            words += _flag(name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    """A flag with its words."""
    if isinstance(value, Mapping):
        value = [f"{key}={each}" for key, each in value.items()]
    if value is None or value is False:
        return []
    words = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [f"--{name}", *([] if value is True else map(str, words))]
