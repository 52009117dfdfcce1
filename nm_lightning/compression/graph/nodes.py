"""What a node of a network's graph is."""

from torch import fx, nn

from nm_lightning.compression.graph.rules import plain
from nm_lightning.compression.structure.operations import assign_into, facts_of


def operation_name(node: fx.Node, layer: nn.Module | None) -> str:
    """What a node does, lower case without underscores."""
    if layer is not None:
        return plain(type(layer).__name__)
    return plain(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target)))


def operation_at_home(node: fx.Node, layer: nn.Module | None) -> str:
    """The operation's name in our table; a user's function or layer is not torch's, whatever its name."""
    name = operation_name(node, layer)
    home = getattr(node.target if layer is None else type(layer), "__module__", None)
    at_home = not home or home.startswith(("torch", "_operator", "operator", "builtins", assign_into.__module__))
    return name if at_home else f"{home}.{name}"


def in_place(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether an operation writes into its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    writes = writes or facts_of(plain(name)).twin is not None
    return writes or bool(getattr(layer, "inplace", False) is True or node.kwargs.get("inplace", False))


def where(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, in brackets; empty where it is unknown."""
    return f" ({node.meta['line']})" if "line" in node.meta else ""
