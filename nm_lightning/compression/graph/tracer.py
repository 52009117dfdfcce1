"""From a network to `torch.fx`'s graph of it, by running it once on an example.

Every call of a torch function, and of a layer that is not looked into, becomes a node. The values are ordinary tensors
all the while, mostly without data, so that the user's code takes the path that it takes when it is called: conditions,
loops and unpacking see true shapes. Sizes remember where they come from (see `numbers.py`). Only the value of an
activation can decide nothing.
"""

import builtins
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from nm_lightning.compression.graph.frames import line_of, users_frame, users_line
from nm_lightning.compression.graph.nodes import in_place
from nm_lightning.compression.graph.numbers import Whole, numbered
from nm_lightning.compression.graph.rules import RULES, plain, taught
from nm_lightning.compression.structure.copies import containers_kept
from nm_lightning.compression.structure.inputs import Inputs, arguments, first, layer_by_layer, mapped, tensors_in
from nm_lightning.compression.structure.operations import CHANNEL_NORMS, MIXING_NORMS, assign_into, facts_of
from nm_lightning.compression.structure.plan import named_tensors
from nm_lightning.errors import InputError

# functions that give a value away
DECIDERS = {
    *(getattr(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "__complex__")),
    *(getattr(Tensor, name) for name in ("item", "tolist", "numpy", "is_nonzero", "equal", "allclose")),
    *(Tensor.__array__, Tensor.__contains__, Tensor.nonzero, torch.nonzero),
    *(torch.is_nonzero, torch.equal, torch.allclose),
}
BLOCKS = (  # torch's own, whose code is that of their layers
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
PLAIN = {int, float, bool, str, complex, type(None), type(...), torch.dtype, torch.device, torch.layout}


def graph_of(model: nn.Module, inputs: Inputs) -> fx.Graph:
    """A network's graph, which a `torch.fx.Interpreter` runs on batches of any size.

    Args:
        model: the network, in the mode in which it is to be run.
        inputs: what it accepts; two images are enough where two are accepted.

    Returns:
        The graph, with a placeholder for each tensor of the inputs; each node's meta has the `shape` of its value.
    """
    try:
        recorder = Recorder(model)
        with torch.no_grad():
            recorder.record(first(inputs, 2))
    except Exception:  # some read their batch in groups
        recorder = Recorder(model)
        with torch.no_grad():
            recorder.record(inputs)
    for node, value in recorder.values.items():
        if isinstance(value, Tensor):
            node.meta["shape"] = value.shape
    return recorder.graph


def shapes_of(graph: fx.Graph) -> dict[fx.Node, torch.Size]:
    """The shape of each node's value that is a tensor, for the example that the graph was recorded with."""
    return {node: node.meta["shape"] for node in graph.nodes if "shape" in node.meta}


class Recorder(TorchFunctionMode):
    """Records what a network does to an example.

    The layers and functions that have a rule stay whole, and torch's layers. A subclass of a known layer stays whole
    too, whatever its forward does.

    Args:
        root: the network.

    Attributes:
        graph: what was recorded; where the network failed its last node has no value.
        values: each node's.
        escaped: sizes whose number was read by something that does not record.
        compared: sizes that were compared, with what and in which module's code, the last one last.
    """

    def __init__(self, root: nn.Module):
        super().__init__()
        self.root, self.graph = root, fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.escaped: list[fx.Node] = []
        self.compared: list[tuple[Whole, Any, str]] = []
        self.names = {id(tensor): name for name, tensor in reversed(named_tensors(root).items())}
        self.modules = {module: name for name, module in root.named_modules()}
        self.stack: list[str] = []  # names of the modules whose code runs
        self.known: dict[int, tuple[Tensor, fx.Node, tuple]] = {}  # by id: the tensor, whose part it is, and which
        self.parameters: dict[str, fx.Node] = {}
        self.constants: dict[int, Tensor] = {}
        self.live: set[fx.Node] = set()  # those that depend on the inputs' values
        self.hollow = any(tensor.is_meta for tensor in root.parameters())

    def record(self, inputs: Inputs) -> Any:
        """Run the network; returns its outputs."""
        args, kwargs = arguments(inputs)
        names = _input_names(self.root, len(args), kwargs)
        args, kwargs = mapped(lambda tensor: tensor.detach().clone(), (args, kwargs))
        for name, value in zip(names, [*args, *kwargs.values()], strict=True):
            for tensor in tensors_in((value,)):
                node = self._node("placeholder", name, (), {})
                self.live.add(node)
                self._keep(node, tensor)
        with containers_kept(self.root), self._recording():
            outputs = self.root(*args, **kwargs)
        leaves = tuple(leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor))
        self._node("output", "output", (self._symbol(outputs if isinstance(outputs, Tensor) else leaves, []),), {})
        return outputs

    # -- what is recorded

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Torch calls this in the place of its functions."""
        kwargs, name = kwargs or {}, function.__name__
        if name == "__get__":
            return self._attribute(function, args[0])
        if function in SPECIAL:
            return SPECIAL[function](self, function, args, kwargs)
        if not is_tensor_method_or_property(function):
            return self._call("call_function", function, args, kwargs)
        if name.startswith("__"):
            straight = f"__{name[3:]}".replace("__div", "__truediv") if name.startswith("__r") else ""
            if hasattr(operator, straight):  # the constant comes first
                return self._call("call_function", getattr(operator, straight), args[::-1], kwargs)
            if hasattr(operator, name):
                return self._call("call_function", getattr(operator, name), args, kwargs)
        return self._call("call_method", name, args, kwargs, function)

    def layer(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The code calls this in the place of its modules; hooks are not called."""
        name = self.modules.get(module)
        if name is not None and self.stack and is_whole(module):
            keeps = self.hollow and (isinstance(module, (*CHANNEL_NORMS, *MIXING_NORMS)) or _entrywise(module))
            with torch._C.DisableTorchFunction():  # without data there is mostly nothing to compute
                return self._call("call_module", name, args, kwargs, _unchanged if keeps else module.forward)
        if name is None and next(module.parameters(), None) is not None:
            line = users_line()
            raise InputError(
                f"{type(self.root).__name__} runs a {type(module).__name__} that is none of its own modules"
                + (f" ({line})" if line else "")
            )
        self._keep_whole(getattr(module.forward, "__globals__", {}))
        self.stack.append(name or (self.stack[-1] if self.stack else ""))
        try:
            return module.forward(*args, **kwargs)
        finally:
            self.stack.pop()

    def number_node(self, kind: str, target: Any, args: tuple, value: Any) -> fx.Node:
        """A node for a number that a size gave."""
        node = self._node(kind, target, self._symbol(args, []), {})
        self.values[node] = value
        return node

    # -- how

    def _call(self, kind: str, target: Any, args: tuple, kwargs: dict, run: Callable | None = None) -> Any:
        """Record a call if something in it was recorded, and do it."""
        if kwargs and not args:
            args, kwargs = _first_by_position(kwargs)
        sources: list = []
        symbols = self._symbol((args, kwargs), sources)
        nodes = [node for node in sources if node is not None]
        run = run or target
        if not nodes:
            return self._constant(run(*args, **kwargs))
        if len(nodes) < len(sources):  # a constant meets the network
            args, kwargs = mapped(self._beside, (args, kwargs))
        try:
            value = run(*args, **kwargs)
        except Exception:
            self._node(kind, target, *symbols)  # it is known where it failed
            raise
        if not any(isinstance(leaf, Tensor) for leaf in leaves_of(value)):
            return value
        node = self._node(kind, target, *symbols)
        if not self.live.isdisjoint(nodes):
            self.live.add(node)
        if (
            args
            and isinstance(args[0], Tensor)
            and in_place(node, self.root.get_submodule(target) if kind == "call_module" else None)
        ):
            value = args[0]
        else:
            value = mapped(self._fresh, value)
        self._keep(node, value)
        return value

    def _decide(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What gives a value away: a constant's, or a parameter's where there is data."""
        sources: list = []
        self._symbol((args, kwargs), sources)
        if not self.live.isdisjoint(sources):
            raise Undecided(type(self.root).__name__, users_line())
        return function(*args, **kwargs)

    def _rows(self, function: Callable, args: tuple, kwargs: dict) -> Iterator[Tensor]:
        return iter(self._call("call_method", "unbind", (args[0], 0), {}, Tensor.unbind))

    def _assign(self, function: Callable, args: tuple, kwargs: dict) -> None:
        self._call("call_function", assign_into, args, kwargs)

    def _sizes(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        return self._size(*args, **kwargs)

    def _count(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        return self._measure("numel", function(*args), args)

    def _fresh(self, tensor: Tensor) -> Tensor:
        """The same tensor as another object, if it was recorded already: a value has one node."""
        tensor = self._beside(tensor)
        return tensor.detach() if id(tensor) in self.known or id(tensor) in self.names else tensor

    def _keep(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        for path, leaf in _paths(value):
            self.known[id(leaf)] = leaf, node, path

    def _constant(self, value: Any) -> Any:
        for leaf in leaves_of(value):
            if isinstance(leaf, Tensor):
                self.constants[id(leaf)] = leaf
        return value

    def _beside(self, tensor: Tensor) -> Tensor:
        return tensor.to("meta") if self.hollow and not tensor.is_meta else tensor

    def _attribute(self, getter: Callable, tensor: Tensor) -> Any:
        """`tensor.shape` and the like."""
        name = getter.__self__.__name__
        if name == "shape":
            return self._size(tensor)
        value = getter(tensor)
        if not isinstance(value, Tensor):
            return value
        if name == "data":
            return self._call("call_method", "detach", (tensor,), {}, Tensor.detach)
        if name == "T":
            order = tuple(reversed(range(value.ndim)))
            return self._call("call_method", "permute", (tensor, order), {}, Tensor.permute)
        if name == "mT":
            return self._call("call_method", "transpose", (tensor, -2, -1), {}, Tensor.transpose)
        return self._call("call_function", getattr, (tensor, name), {})

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        """`tensor.size()`, of numbers that know where they come from."""
        if dim is not None:
            return self._measure("size", tensor.size(dim), (tensor, dim))
        return torch.Size([self._measure("size", size, (tensor, dim)) for dim, size in enumerate(tensor.shape)])

    def _measure(self, method: str, number: int, args: tuple) -> Any:
        if id(args[0]) not in self.known and id(args[0]) not in self.names:
            return number
        return numbered(number, self, "call_method", method, args)

    def _symbol(self, value: Any, sources: list) -> Any:
        """An argument as the graph has it; `sources` gets the nodes in it, and None for a constant tensor."""
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, sources)
        if kind in (tuple, list, torch.Size):
            found = [self._symbol(each, sources) for each in value]
            return found if kind is list else tuple(found)
        if isinstance(value, (int, float)) and hasattr(value, "recorder"):
            sources.append(value.node)
            return value.node
        if kind is slice:
            return slice(*(self._symbol(each, sources) for each in (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {key: self._symbol(each, sources) for key, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self._symbol(each, sources) for each in value))
        return value

    def _tensor(self, tensor: Tensor, sources: list) -> fx.Node | Tensor:
        entry = self.known.get(id(tensor))
        if entry is not None:
            _, node, path = entry
            for key in path:  # a part of a tuple
                part = self._node("call_function", operator.getitem, (node, key), {})
                self.values[part] = self.values[node][key]
                self.live |= {part} if node in self.live else set()
                node = part
            self.known[id(tensor)] = tensor, node, ()
        elif id(tensor) in self.names:
            name = self.names[id(tensor)]
            if name not in self.parameters:
                self.parameters[name] = self._node("get_attr", name, (), {})
                self.values[self.parameters[name]] = tensor
            node = self.parameters[name]
        elif self.hollow and tensor.is_meta and id(tensor) not in self.constants:
            raise InputError(f"{type(self.root).__name__} makes a tensor by no function of torch's ({users_line()})")
        else:
            self.constants[id(tensor)] = tensor
            sources.append(None)
            return self._beside(tensor)
        sources.append(node)
        return node

    def _node(self, kind: str, target: Any, args: tuple, kwargs: dict) -> fx.Node:
        node, frame = self.graph.create_node(kind, target, args, kwargs), users_frame()
        node.meta["module"] = self.whose_code(None if kind == "call_module" else frame)
        if frame is not None:
            node.meta["line"] = line_of(frame)
        return node

    def whose_code(self, frame: FrameType | None) -> str:
        """The name of the module whose code runs in a frame; that whose forward runs, if it is none's."""
        own = frame.f_locals.get("self") if frame is not None else None
        name = self.modules.get(own) if isinstance(own, nn.Module) else None
        return name if name is not None else self.stack[-1] if self.stack else ""

    # -- where torch and Python call us

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Torch's functions, modules and `len` come to us."""
        plain_len = builtins.len

        def length(thing: Any) -> int:
            if type(thing) is not Tensor:
                return plain_len(thing)
            with torch._C.DisableTorchFunction():
                return self._size(thing, 0)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.layer(module, *args, **kwargs)

        with ExitStack() as self.patches:
            self.patched: set[int] = set()
            if "torch._dynamo" in sys.modules:
                self.patches.enter_context(torch.compiler.set_stance("force_eager"))
            self.patches.enter_context(layer_by_layer())
            self._swap(nn.Module, "__call__", call)
            self._swap(builtins, "len", length)
            self.patches.enter_context(self)
            yield

    def _swap(self, home: Any, name: str, value: Any) -> None:
        self.patches.callback(setattr, home, name, getattr(home, name))
        setattr(home, name, value)

    def _keep_whole(self, names: dict[str, Any]) -> None:
        """The functions that have a rule are not looked into."""
        functions = {target for target in RULES if inspect.isfunction(target)}
        if not functions or id(names) in self.patched:
            return
        self.patched.add(id(names))
        for name, function in list(names.items()):
            if inspect.isfunction(function) and function in functions:

                def whole(*args: Any, function: Callable = function, **kwargs: Any) -> Any:
                    with torch._C.DisableTorchFunction():
                        return self._call("call_function", function, args, kwargs)

                self.patches.callback(names.__setitem__, name, function)
                names[name] = whole


SPECIAL = {
    **dict.fromkeys(DECIDERS, Recorder._decide),
    **dict.fromkeys((Tensor.numel, Tensor.nelement, torch.numel), Recorder._count),
    Tensor.size: Recorder._sizes,
    Tensor.__iter__: Recorder._rows,
    Tensor.__setitem__: Recorder._assign,
}


class Undecided(InputError):
    """The user's code asks for an activation's value."""

    def __init__(self, name: str, where: str):
        super().__init__(f"{name} decides by an activation's values" + (f" ({where})" if where else ""))


def is_whole(module: nn.Module) -> bool:
    """Whether a module's code is not looked into: torch's layers, and those that have a rule."""
    if "forward" in vars(module):  # the user's
        return False
    torchs_own = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
    return bool(taught(module)) or (torchs_own and not isinstance(module, BLOCKS))


def _unchanged(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _entrywise(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.") and facts_of(plain(type(module).__name__)).kind == "entry"


def _first_by_position(kwargs: dict) -> tuple[tuple, dict]:
    """Arguments by name, the first of them by its position."""
    for name in ("input", "self", "tensors"):
        if name in kwargs:
            return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    return (), kwargs


def _input_names(model: nn.Module, count: int, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the inputs, as the network's forward has them."""
    named = [
        name for name, each in inspect.signature(model.forward).parameters.items() if each.kind < each.KEYWORD_ONLY
    ]
    return [*(named + [f"input_{i}" for i in range(count)])[:count], *kwargs]


def leaves_of(value: Any) -> list:
    """What is in a value, also in dataclasses, dictionaries of any class, and other objects."""
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, (tuple, list)) and hasattr(value, "__dict__"):
        value = [each for each in vars(value).values() if isinstance(each, (Tensor, Mapping, tuple, list))]
    return [leaf for each in value for leaf in leaves_of(each)] if isinstance(value, (tuple, list)) else [value]


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors in a value, each with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, each in enumerate(value):
            yield from _paths(each, (*path, index))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _paths(each, (*path, key))
