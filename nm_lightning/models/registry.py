"""The registry of architectures: each registers itself in the file that it is written in."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nm_lightning.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """A family of networks.

    Attributes:
        pattern: of their names, a regular expression; what its groups match is handed to `build`, numbers as integers.
        shown: the names, for people.
        build: `(*groups, num_classes=, input_shape=)`, and `widths=` or `weights=` if it takes them.
        hidden: `(*groups)` to the number of widths that it takes; None where there is no such network.
        pretrained: whether it takes `weights` instead.
    """

    pattern: str
    shown: str
    build: Callable[..., nn.Module]
    hidden: Callable[..., int | None]
    pretrained: bool = False


ARCHITECTURES: list[Architecture] = []


def register(
    pattern: str, shown: str = "", hidden: Callable[..., int | None] = lambda *groups: 0, pretrained: bool = False
) -> Callable:
    """Make a network, or the function that builds one, known by its name; see `Architecture`."""

    def known(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        ARCHITECTURES.append(Architecture(pattern, shown or pattern, build, hidden, pretrained))
        return build

    return known


def build_model(
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    widths: Sequence[int] | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Build a network by its registered name.

    Args:
        name: of a registered architecture.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: neurons of each hidden layer in order, see `nm_lightning.models`; None for the architecture's own.
        weights: torchvision's pretrained weights (`DEFAULT`, `IMAGENET1K_V1`, ...); only for `torchvision/<name>`.

    Returns:
        The network, freshly initialised unless `weights` is given.

    Raises:
        InputError: unknown name, a wrong number of widths, or weights where there are none.

    >>> build_model("lenet_300_100", num_classes=10, input_shape=(1, 28, 28), widths=(150, 50)).ip2
    Linear(in_features=150, out_features=50, bias=True)
    """
    architecture, groups, hidden = _find(name)
    options: dict[str, Any] = {"num_classes": num_classes, "input_shape": tuple(input_shape)}
    if architecture.pretrained:
        options["weights"] = weights
    elif weights is not None:
        raise InputError(f"weights {weights!r}: only torchvision/<name> has pretrained weights, {name} has none")
    if widths is not None:
        if not hidden:
            raise InputError(f"{name} takes no widths: build it whole, then compress it")
        if len(widths) != hidden or any(width < 1 for width in widths):
            raise InputError(f"widths {list(widths)}: {name} takes {hidden} positive integers")
        options["widths"] = tuple(widths)
    return architecture.build(*groups, **options)


def _find(name: str) -> tuple[Architecture, list[int | str], int]:
    """The architecture of a name, what its groups match, and how many hidden widths it takes."""
    for architecture in reversed(ARCHITECTURES):  # a user's own come first
        if match := re.fullmatch(architecture.pattern, name):
            groups = [int(group) if group.isdigit() else group for group in match.groups()]
            hidden = architecture.hidden(*groups)
            if hidden is not None:
                return architecture, groups, hidden
    names = ", ".join(architecture.shown for architecture in ARCHITECTURES)
    raise InputError(f"unknown model {name!r}: choose from {names}")
