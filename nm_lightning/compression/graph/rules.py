"""What a rule is: a function that tells, for one operation, which neurons its result comes from.

A rule gets the follower, whose verbs note what the operation asks of the neurons, and the call. It returns the tensor
of neurons of the result (or tuples of them, as the result is), or None where it can't say. Ours and a user's are
registered alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from nm_lightning.compression.structure.operations import facts_of, is_own_norm


@dataclass
class Call:
    """One step of a network's forward, as a rule sees it.

    Attributes:
        node: its node in the graph.
        operation: its name in the table of operations; a user's function or layer has its module's name before it.
        layer: the module that is called, None for a function or method.
        args: the values that it gets.
        kwargs: those by name.
        origins: `(args, kwargs)` with a tensor of neurons in the place of each tensor.
        sources: the tensors of neurons among these.
        value: the result; it may be without data.
        name: the layer's name in the network.
        source: the neurons that the layer reads: those of its first tensor, if not told otherwise.
    """

    node: fx.Node
    operation: str
    layer: nn.Module | None
    args: tuple
    kwargs: dict
    origins: tuple
    sources: list[Tensor]
    value: Any
    name: str = ""
    source: Tensor | None = None

    def __post_init__(self):
        if self.source is None:
            self.source = next(iter(self.sources), None)

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """An argument's value, given by name or position."""
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def symbol(self, name: str, position: int, default: Any = None) -> Any:
        """The same as the graph has it: a node where the user's code computes it."""
        given = self.node.args
        return self.node.kwargs.get(name, given[position] if len(given) > position else default)


Rule = Callable[[Any, Call], Any]

RULES: dict[Any, Rule] = {}  # by class, by function, by operation's name
KINDS: dict[str, Rule] = {}  # by kind of operation
OWN_NORM = "a norm of the user's"  # the name of the rule for modules that are one, see `is_own_norm`


def rule(*targets: type | Callable | str, kinds: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule, by `@rule(...)` above it; a later one for the same target takes the place of an earlier one.

    Args:
        targets: classes of modules, which the tracer then keeps whole, their subclasses too; functions; names of
            operations, as `roll`.
        kinds: kinds of operations (see `structure.operations`), for those without a rule by name.

    A rule for a class or function comes before one by name, and is called even where nobody owns what it reads.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[plain(target) if isinstance(target, str) else target] = function
        KINDS.update(dict.fromkeys(kinds, function))
        return function

    return register


def plain(name: str) -> str:
    """A name as the table of operations spells it: lower case without underscores."""
    return name.replace("_", "").lower()


def taught(target: Any) -> list[Rule]:
    """The rules for a module, by its classes, the nearest first, or for a function."""
    kind = type(target) if isinstance(target, nn.Module) else target
    keys = kind.__mro__ if isinstance(kind, type) else [kind] if callable(kind) else []
    found = [RULES[key] for key in keys if key in RULES]
    return [RULES[plain(OWN_NORM)]] if not found and is_own_norm(target) else found


def known(operation: str) -> list[Rule]:
    """The rule for an operation, by its name, or else by its kind."""
    found = RULES.get(operation) or KINDS.get(facts_of(operation).kind)
    return [found] if found else []
