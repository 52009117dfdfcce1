"""A network's modules. `nn.Module.named_modules` asks each of them once for each level above it."""

from torch import nn


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by every name they have, in the order of `named_modules`."""
    found, pending = [], [("", model)]
    while pending:
        name, module = pending.pop()
        found.append((name, module))
        start = f"{name}." if name else ""
        pending += [(start + part, child) for part, child in reversed(module._modules.items()) if child is not None]
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Each module once, in the order of `modules`."""
    return list({id(module): module for _, module in parts_of(model)}.values())
