"""The recipe's settings as flags of a command line."""

import argparse
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nm_lightning.cli.errors import fail
from nm_lightning.compression.recipe import Recipe, settings
from nm_lightning.compression.settings import default_of

SOURCE = ("checkpoint", "model", "data", "data_dir", "weights", "input_key", "label_key")
SOURCE += ("calibration", "latency", "device")
SEVERAL = ("ratio", "widths", "sites")  # a flag of several words
ALIASES = {"lamda": ("--lambda",)}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, its help and type from the setting itself; `None` where it is not given."""
    for name, own in settings().items():
        shown = "" if default_of(own) is None or own.type is bool else f" ({default_of(own)})"
        options: dict[str, Any] = {"default": None, "help": own.metadata["help"] + shown}
        if own.type is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": _word(own.type), "nargs": "+" if name in SEVERAL else None}
        parser.add_argument(f"--{name}", *ALIASES.get(name, ()), **options)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by name."""
    given = {name: getattr(args, name) for name in settings() if getattr(args, name) is not None}
    if "widths" in given:
        given["widths"] = parse_widths(given["widths"])
    return given


def _word(kind: Any) -> type:
    """The type of one word of a value."""
    united = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((kind for kind in (float, int) if kind in united), str)


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


def recipe_words(recipe: Recipe, preset: Collection[str] = ()) -> list[str]:
    """The flags that ask for a recipe; defaults are left out, but for what a preset would say otherwise."""
    values, known = recipe.flat(), settings()
    if isinstance(values.get("widths"), Sequence):
        values.pop("ratio", None)  # it has no say
    words = ["--method", recipe.method.label, "--criterion", recipe.criterion.label]
    for name, value in values.items():
        if name == "ratio" or name in preset or value != default_of(known[name]):
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
