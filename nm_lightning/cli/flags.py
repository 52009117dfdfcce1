"""The recipe's settings as flags of a command line."""

import argparse
import types
import typing
from collections.abc import Sequence
from typing import Any

from nm_lightning.cli.errors import fail
from nm_lightning.compression.recipe import settings
from nm_lightning.compression.settings import default_of

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
