"""The user's own code by name: `my_package.nets:MyModule`, `timm/<name>`, `hf/<folder>`, and arguments from text."""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nm_lightning.errors import InputError, first_line

BY_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*[:.][A-Za-z_][\w.]*")  # package.module:attribute, or with a dot throughout
LOOKED_UP = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_][\w.]*)(\(\))?")  # as an argument's value, with a colon
LIBRARIES = ("timm", "hf")


def is_own(name: str | None) -> bool:
    """Whether a name is of code to import, not one that is registered here.

    >>> is_own("my_package.nets:MyModule"), is_own("timm/resnet18"), is_own("torchvision/resnet18")
    (True, True, False)
    """
    return name is not None and (name.partition("/")[0] in LIBRARIES or BY_NAME.fullmatch(name) is not None)


def find_here() -> None:
    """Make the current folder's modules importable, as they are to `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def find(name: str, what: str = "model") -> Callable:
    """The class or function of a name.

    Args:
        name: `module:attribute`, `timm/<name>`, or `hf/<folder>`, which `save_pretrained` made.
        what: it is, for errors.

    Raises:
        InputError: it can't be imported, or is nothing that can be called.
    """
    library, _, rest = name.partition("/")
    if library in LIBRARIES:
        return (_timm if library == "timm" else _transformers)(name, rest)
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    found: Any = _import(module, f"{what} {name!r}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            here = getattr(found, "__name__", None)
            own = ", ".join(key for key, value in vars(found).items() if getattr(value, "__module__", "") == here)
            raise InputError(f"{what} {name!r}: {module} has no {attribute}" + (f": it has {own}" if own else ""))
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{what} {name!r} is a {type(found).__name__}: name a class, or a function that builds one")
    return found


def construct(build: Callable, given: Mapping[str, Any], name: str, what: str = "model") -> Any:
    """Call a class or a function with arguments by name.

    Args:
        build: see `find`.
        given: its arguments.
        name: of it, for errors.
        what: the flag that gives its arguments, `--<what>.<argument>`.

    Raises:
        InputError: an argument that it does not take, one that it needs, or whatever it says itself.
    """
    taken, needed, takes_any = parameters(build)
    for argument in given:
        if argument not in taken and not takes_any:
            raise InputError(f"--{what}.{argument}: {name} takes {', '.join(taken) or 'no arguments'}")
    for argument in needed:
        if argument not in given:
            raise InputError(f"{what} {name!r} needs {argument}: give --{what}.{argument} VALUE")
    try:
        return build(**given)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        shown = ", ".join(f"{key} {value!r}"[:60] for key, value in given.items())
        how = f" with {shown}" if shown else ""
        raise InputError(f"{what} {name!r} can't be built{how}: {type(error).__name__}: {first_line(error)}") from error


def parameters(build: Callable) -> tuple[list[str], list[str], bool]:
    """The arguments that a class or a function takes by name, those that it needs, and whether it takes any others."""
    try:
        own = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # written in C
        return [], [], True
    named = [one for one in own if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    needed = [one.name for one in named if one.default is one.empty]
    return [one.name for one in named], needed, any(one.kind is one.VAR_KEYWORD for one in own)


def values(build: Callable, words: Mapping[str, str]) -> dict[str, Any]:
    """Arguments from a command line's words: YAML, text where text is asked for, `module:attribute` for what it names.

    >>> def net(width, rate=0.0, act=None, name: str = ""): ...
    >>> values(net, {"width": "32", "rate": "1e-3", "act": "math:sqrt", "name": "007"})
    {'width': 32, 'rate': 0.001, 'act': <built-in function sqrt>, 'name': '007'}
    """
    try:
        kinds = {name: own.annotation for name, own in inspect.signature(build).parameters.items()}
    except (TypeError, ValueError):
        kinds = {}
    return {name: word if kinds.get(name) in (str, "str") else _value(name, word) for name, word in words.items()}


def _value(name: str, word: str) -> Any:
    if match := LOOKED_UP.fullmatch(word):  # text of this form stands in quotes
        found = find(match[1], name)
        return construct(found, {}, match[1], name) if match[2] else found
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    try:
        return float(value) if isinstance(value, str) and value == word else value  # 1e-3 is text in YAML
    except ValueError:
        return value


def _import(module: str, label: str) -> Any:
    """A module, from the current folder too; `label` begins what an error says."""
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module does as it is imported
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            where = f"in {str(Path.cwd())!r} or among the installed packages"
            raise InputError(f"{label}: there is no module {missing} {where}") from error
        raise InputError(f"{label}: {module} can't be imported: {type(error).__name__}: {first_line(error)}") from error


def _timm(name: str, architecture: str) -> Callable:
    if importlib.util.find_spec("timm") is None:
        raise InputError(f"model {name!r} needs timm: pip install timm")
    create_model = _import("timm", f"model {name!r}").create_model

    def build(num_classes: int | None = None, **arguments: Any) -> Any:
        return create_model(architecture, **arguments, **({} if num_classes is None else {"num_classes": num_classes}))

    return build


def _transformers(name: str, folder: str) -> Callable:
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"model {name!r}: {folder!r} is no folder with a config.json, as save_pretrained makes them")
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"model {name!r} needs transformers: pip install transformers")
    auto = _import("transformers", f"model {name!r}").AutoModelForImageClassification
    return functools.partial(auto.from_pretrained, folder, local_files_only=True)
