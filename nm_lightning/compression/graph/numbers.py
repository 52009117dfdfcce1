"""Sizes that remember where they come from: ordinary numbers to the user's code, nodes in the graph.

Conditions, loops and indices are decided by the example's number. Where a size is an argument of an operation, alone
or after arithmetic, the graph has the arithmetic, so that it holds for other sizes too.
"""

import math
import operator
from typing import Any

from torch import fx

from nm_lightning.compression.graph.frames import users_frame


class _Number:
    """What `Whole` and `Real` share.

    Attributes:
        number: the plain one.
        recorder: who records the graph.
        made: how its node is made: the kind, the target and the arguments.
    """

    number: Any
    recorder: Any
    made: tuple[str, Any, tuple]
    _node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        """Its node, made when it is first asked for."""
        if self._node is None:
            kind, target, args = self.made
            self._node = self.recorder.number_node(kind, target, args, self.number)
        return self._node

    def __reduce__(self) -> tuple:
        return type(self.number), (self.number,)  # a copy is a plain number

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return repr(self.number)

    __str__ = __repr__

    def __format__(self, form: str) -> str:
        return format(self.number, form)


class Whole(_Number, int):
    """A whole number that a size gave."""

    def __float__(self) -> float:
        self.recorder.escaped.append(self.node)  # as in `math.sqrt`: what becomes of it is not seen
        return float(self.number)


class Real(_Number, float):
    """A fraction that a size gave."""


def numbered(number: Any, recorder: Any, kind: str, target: Any, args: tuple) -> Any:
    """A number with its origin; truth values and other things stay as they are."""
    if type(number) not in (int, float):
        return number
    found = (Whole if type(number) is int else Real).__new__(Whole if type(number) is int else Real, number)
    found.number, found.recorder, found.made = number, recorder, (kind, target, args)
    return found


def plain_number(value: Any) -> Any:
    """Without its origin."""
    return value.number if isinstance(value, _Number) else value


def _arithmetic(function: Any, reflected: bool = False) -> Any:
    def method(self: _Number, *others: Any) -> Any:
        if not all(isinstance(other, (int, float)) for other in others):
            return NotImplemented  # a tensor's
        args = (*others, self) if reflected else (self, *others)
        return numbered(function(*map(plain_number, args)), self.recorder, "call_function", function, args)

    return method


def _comparison(function: Any) -> Any:
    def method(self: _Number, other: Any) -> Any:
        self.recorder.compared.append((self, other, self.recorder.whose_code(users_frame())))
        return function(self.number, plain_number(other))

    return method


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    setattr(_Number, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(_Number, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))
for _name in ("neg", "abs"):
    setattr(_Number, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name, _function in {"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round}.items():
    setattr(_Number, f"__{_name}__", _arithmetic(_function))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Number, f"__{_name}__", _comparison(getattr(operator, _name)))
