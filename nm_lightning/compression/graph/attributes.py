"""Numbers that a module holds, known by their values: which of its attributes is a width that its code reads."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def attributes_of(module: nn.Module | None, value: int | list[int]) -> list[str]:
    """The attributes of a module that hold a number, or a list or tuple of these numbers."""
    kinds = (int,) if isinstance(value, int) else (list, tuple)
    held = vars(module).items() if module is not None else ()
    return [name for name, own in held if type(own) in kinds and (own if kinds == (int,) else list(own)) == value]


def settings_of(module: nn.Module | None, number: int) -> list[str]:
    """The entries of a module's settings, as `config.width` or `config.widths[2]`, that hold a number."""
    return [path for path, own in _entries(module) if own == number]


def _entries(module: nn.Module | None) -> Iterator[tuple[str, int]]:
    for name, holder in vars(module).items() if module is not None else ():
        if _is_settings(name, holder):
            for label, own in vars(holder).items():
                if type(own) is int:
                    yield f"{name}.{label}", own
                elif type(own) in (list, tuple) and all(type(each) is int for each in own):
                    yield from ((f"{name}.{label}[{place}]", each) for place, each in enumerate(own))


def _is_settings(name: str, holder: Any) -> bool:
    """Whether an attribute is an object that holds settings, as a module's `config` does."""
    plain = hasattr(holder, "__dict__") and not callable(holder) and not isinstance(holder, (nn.Module, Tensor))
    return plain and not name.startswith("_")


def counts_heads(name: str) -> bool:
    """Whether an attribute is called as a number of heads is, and not as their length."""
    return "head" in name and not any(word in name for word in ("dim", "size"))


def tell_apart(choices: dict[int, dict[str, int]], ndim: int) -> None:
    """Where there are as many heads as each is long, their number comes first, and their length last.

    Args:
        choices: by dimension, the attributes that may count it, each with a divisor; changed in place.
        ndim: of the tensor that is cut into heads.
    """
    numbers = {name for names in choices.values() for name in names if counts_heads(name)}
    lengths = {name for names in choices.values() for name in names if "head" in name} - numbers
    both = [dim for dim, names in choices.items() if names.keys() & lengths and names.keys() & numbers]
    for dim in both:
        last = dim == ndim - 1 or dim in both[1:]
        choices[dim] = {name: each for name, each in choices[dim].items() if (name in numbers) is not last}
