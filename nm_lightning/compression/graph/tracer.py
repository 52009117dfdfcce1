"""From a network to `torch.fx`'s graph of it, and what a node of that graph is."""

import inspect
import os
import sys
from pathlib import Path
from typing import Any

from torch import fx, nn

from nm_lightning.compression.graph.rules import RULES, plain, taught

HERE = str(Path(__file__).parent) + os.sep


class Tracer(fx.Tracer):
    """Keeps the layers and functions that have a rule whole, and remembers the user's lines.

    A subclass of a known layer stays whole too, whatever its forward does.
    """

    def __init__(self):
        super().__init__(autowrap_functions=tuple(target for target in RULES if inspect.isfunction(target)))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows its line; fx's own `record_stack_traces` does the same, and takes longer than tracing."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame and torchs(frame.f_code.co_filename):
            frame = frame.f_back
        if frame and not ours(frame.f_code.co_filename):  # ours: all the code between is torch's, as in nn.Sequential
            node.meta["line"] = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        return node

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Layers are not looked into."""
        return bool(taught(module)) or super().is_leaf_module(module, qualified_name)


def torchs(file: str) -> bool:
    """Whether a file of code is torch's."""
    return "/torch/" in file.replace("\\", "/")


def ours(file: str) -> bool:
    """Whether a file of code lies in this room."""
    return file.startswith(HERE)


def operation_name(node: fx.Node, layer: nn.Module | None) -> str:
    """What a node does, lower case without underscores."""
    if layer is not None:
        return plain(type(layer).__name__)
    return plain(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target)))


def operation_at_home(node: fx.Node, layer: nn.Module | None) -> str:
    """The operation's name in our table; a user's function or layer is not torch's, whatever its name."""
    name = operation_name(node, layer)
    home = getattr(node.target if layer is None else type(layer), "__module__", None)
    users = home and not home.startswith(("torch", "_operator", "operator", "builtins"))
    return f"{home}.{name}" if users else name


def in_place(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether an operation writes into its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    return writes or bool(getattr(layer, "inplace", False) is True or node.kwargs.get("inplace", False))


def where(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, in brackets; empty where it is unknown."""
    return f" ({node.meta['line']})" if "line" in node.meta else ""
