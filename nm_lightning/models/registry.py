"""The registry of architectures: each registers itself in the file that it is written in."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nm_lightning import own_code
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
        own: whether it is the user's, and takes `arguments`.
    """

    pattern: str
    shown: str
    build: Callable[..., nn.Module]
    hidden: Callable[..., int | None]
    pretrained: bool = False
    own: bool = False


ARCHITECTURES: list[Architecture] = []


def register(
    pattern: str, shown: str = "", hidden: Callable[..., int | None] = lambda *groups: 0, pretrained: bool = False
) -> Callable:
    """Make a network, or the function that builds one, known by its name; see `Architecture`."""

    def known(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        ARCHITECTURES.append(Architecture(pattern, shown or pattern, build, hidden, pretrained))
        return build

    return known


def register_own(name: str) -> None:
    """Let a class or function of the user's be built by its name, such as `my_package.nets:MyNet` or `timm/resnet18`.

    It gets `num_classes` and `input_shape` if it takes arguments of these names. No name in a checkpoint is imported
    that was not registered.

    Raises:
        InputError: it can't be imported.
    """
    if any(architecture.shown == name for architecture in ARCHITECTURES):
        return
    found = own_code.find(name)
    taken, _, _ = own_code.parameters(found)

    def build(arguments: Mapping[str, Any], **shape: Any) -> nn.Module:
        given = {label: value for label, value in shape.items() if label in taken} | dict(arguments)
        network = own_code.construct(found, given, name)
        if not isinstance(network, nn.Module):
            raise InputError(f"model {name!r} builds a {type(network).__name__}, not an nn.Module")
        return network

    ARCHITECTURES.append(Architecture(re.escape(name), name, build, lambda: 0, own=True))


def build_model(
    name: str,
    num_classes: int,
    input_shape: tuple[int, int, int],
    widths: Sequence[int] | None = None,
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network by its registered name.

    Args:
        name: of a registered architecture.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: neurons of each hidden layer in order, see `nm_lightning.models`; None for the architecture's own.
        weights: torchvision's pretrained weights (`DEFAULT`, `IMAGENET1K_V1`, ...); only for `torchvision/<name>`.
        arguments: of the user's own network, see `register_own`.

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
    if architecture.own:
        options["arguments"] = arguments or {}
    elif arguments:
        raise InputError(f"{name} takes no {', '.join(arguments)}")
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
    if own_code.is_own(name):
        raise InputError(f"model {name!r} is code that is not ours: nm_lightning.models.register_own({name!r}) first")
    raise InputError(f"unknown model {name!r}: choose from {names}, or give module:Class of your own")
