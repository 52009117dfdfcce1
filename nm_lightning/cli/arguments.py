"""A constructor's arguments, from the command line's words and a checkpoint's hyper-parameters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.parsing import AttributeDict

from nm_lightning import own_code
from nm_lightning.compression.files.inert import Inert
from nm_lightning.errors import InputError

UNSERIALIZED = "Unable to serialize instance "  # how jsonargparse notes an object that is a default


def hyper_parameters(content: Mapping[str, Any], entry: str = "hyper_parameters") -> dict[str, Any]:
    """Those that a checkpoint has under a name; none where they are no plain dictionary."""
    found = content.get(entry)
    left_out = {name.partition(".")[0]: Inert() for name in content.get(f"{entry}_left_out", [])}
    return {**found, **left_out} if isinstance(found, dict) else {}


def arguments(
    build: Callable,
    what: str,
    words: Mapping[str, str],
    known: Mapping[str, Any],
    path: Path | None = None,
    hparams_name: str | None = None,
) -> dict[str, Any]:
    """The words' values, and for all else that the constructor takes the hyper-parameters.

    Args:
        build: the constructor.
        what: `model` or `data`, the flag that the words were given to.
        words: by name.
        known: the hyper-parameters.
        path: of the checkpoint that they are from.
        hparams_name: of the one argument that takes them all, if there is such a one.

    Raises:
        InputError: a hyper-parameter is an object; no code that a file names is run.
    """
    given = own_code.values(build, words)
    taken, _, takes_any = own_code.parameters(build)
    known = {name: value for name, value in known.items() if not name.startswith("_")}  # those are LightningCLI's
    if hparams_name in taken:
        known = {hparams_name: AttributeDict(known)}
    for name, value in known.items():
        if name in given or not (takes_any or name in taken):
            continue
        kind = _object(value)
        if kind:
            raise InputError(
                f"checkpoint {str(path)!r}: {name} is an object ({kind}), and no code in a file is run: "
                f"give --{what}.{name} VALUE, or module:function() of what it is"
            )
        given[name] = value
    return given


def _object(value: Any) -> str:
    """The class of an object that a file told of and nobody built; empty for plain data."""
    if isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
        kind = value if isinstance(value, type) else type(value)
        return "left out" if kind is Inert else kind.__name__
    if isinstance(value, str) and value.startswith(UNSERIALIZED):
        return value.removeprefix(UNSERIALIZED)
    if isinstance(value, Mapping):
        if "class_path" in value:  # LightningCLI would build it
            return str(value["class_path"])
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return ""
    return next(filter(None, map(_object, value)), "")
