"""Layers that compute their weight in each forward, as standardised convolutions do: plain ones that do the same.

Pruned, such a layer would compute another weight for the inputs that stay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nm_lightning.compression.structure.operations import SOLVABLE

PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
SETTINGS = ("stride", "padding", "dilation", "groups")  # of a convolution, by their place behind the bias


class _Products(TorchFunctionMode):
    """Notes each product with a weight, and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict, Tensor]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            self.calls.append((args, kwargs or {}, result))
        return result


@torch.no_grad()
def plain_layer(layer: nn.Module) -> nn.Module | None:
    """The Linear or convolution that does what a subclass does with its computed weight; None if it is not sure.

    The subclass is tried on two inputs: it must make one product of what it is given with the same weight, which is not
    its parameter, and return that.
    """
    kind = next((kind for kind in SOLVABLE if isinstance(layer, kind)), None)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if kind is None or hooks or type(layer).__module__.startswith("torch.") or layer.weight.is_meta:
        return None
    training = layer.training
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            first, second = (_tried(layer.eval(), count) for count in (1, 2))
    except Exception:  # it wants other inputs
        return None
    finally:
        layer.train(training)
    if first is None or second is None or first["weight"] is layer.weight:
        return None
    if not _alike(first, second) or torch.equal(first["weight"], layer.weight):
        return None
    return _made(kind, layer, first).train(training)


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two products differ in no more than their input."""
    if first.keys() != second.keys():
        return False
    pairs = [(first[name], second[name]) for name in first if name != "input"]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )


def _tried(layer: nn.Module, count: int) -> dict[str, Any] | None:
    """The arguments of the one product that a layer makes of so many random inputs; None if it does anything else."""
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    space = [] if isinstance(layer, nn.Linear) else [
        dilation * (size - 1) + 5 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    ]  # fmt: skip
    given = torch.randn(count, channels, *space).to(layer.weight)
    with _Products() as products:
        result = layer(given)
    if len(products.calls) != 1 or products.calls[0][2] is not result:
        return None
    args, kwargs, _ = products.calls[0]
    found = dict(zip(("input", "weight", "bias", *SETTINGS), args, strict=False)) | kwargs
    return {"bias": None, **found} if found["input"] is given else None


def _made(kind: type, layer: nn.Module, found: dict[str, Any]) -> nn.Module:
    weight, bias = found["weight"], found["bias"]
    if kind is nn.Linear:
        made = nn.Linear(*reversed(weight.shape), bias is not None, device="meta")
    else:
        settings = {name: found[name] for name in SETTINGS if name in found}
        channels = weight.shape[1] * settings.get("groups", 1)
        made = kind(channels, len(weight), weight.shape[2:], bias=bias is not None, device="meta", **settings)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(made, name, nn.Parameter(value.detach().clone(), requires_grad=layer.weight.requires_grad))
    return made


def make_computed_plain(model: nn.Module) -> list[str]:
    """Put plain layers in the place of those that compute their weight, in place; says which."""
    found = {module: made for module in model.modules() if (made := plain_layer(module)) is not None}
    notes = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parent, _, attribute = name.rpartition(".")
        if module in found and name:
            setattr(model.get_submodule(parent), attribute, found[module])
            notes.append(f"{name}.weight: what {type(module).__name__} computes was made plain")
    return notes
