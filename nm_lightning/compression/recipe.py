"""A recipe: all that describes a compression but the network, the images and the ranks."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from nm_lightning.compression import refine  # noqa: F401 - they register themselves
from nm_lightning.compression.graph.trace import ATTENTION, SCOPES
from nm_lightning.compression.methods import Merge
from nm_lightning.compression.selection import Auto, L2Norm, Ratio
from nm_lightning.compression.settings import (
    AUTO,
    Budget,
    Criterion,
    Method,
    Refinement,
    Values,
    asked_for,
    check_given,
    choice,
    default_of,
    is_auto,
    plain,
    setting,
    settings_of,
    whole,
)
from nm_lightning.errors import InputError

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"method": "merge", "criterion": "l2-norm"},
    "normal": {"method": "reconstruct", "criterion": "output", "attention": "dimensions"},
    "best": {
        "method": "reconstruct",
        "criterion": "output",
        "attention": "dimensions",
        "spread": "cost",
        "refit": 2,
        "refit_horizon": 3,
    },
}


@dataclass(frozen=True)
class Effort:
    """Settings by one word, for whoever does not want to choose them; those that are given beside it win."""

    effort: str = setting(
        None,
        "instead of method and criterion: fast (merge, no images), normal (reconstruct, output, heads by dimensions), "
        "best (widths by cost and refit, too)",
        choice(*EFFORTS),
        off=None,
    )


@dataclass(frozen=True)
class Recipe:
    """Plain data that stands in every checkpoint and report; `compress` of a recipe read back gives the same bits.

        Recipe(Reconstruct(ridge=1e-2), OutputAware(), Macs(0.5), then=(Refit(2),))

    Attributes:
        method: what becomes of the removed neurons.
        criterion: which neurons stay.
        budget: how many.
        sites: glob patterns of the layers to compress; None for all.
        scope: `hidden` for neurons inside a block, `all` for those of residual streams too.
        attention: what goes of an attention, `heads` or `dimensions` of each.
        then: what follows, in this order.
        calibration_size: how many images to look at, at most.
        calibration_steps: of Adam on each synthetic image, towards the BatchNorms' own statistics.
        seed: of whatever is drawn.
    """

    method: Method = field(default_factory=Merge)
    criterion: Criterion = field(default_factory=L2Norm)
    budget: Budget = field(default_factory=Ratio)
    sites: Sequence[str] | None = setting(None, "glob patterns of layer names (all)", auto=True)
    scope: str = setting(
        "hidden", "hidden: neurons inside a block, as in the paper; all: residual streams too", choice(*SCOPES)
    )
    attention: str = setting(
        "heads",
        "heads: fewer of them; dimensions: shorter ones, the queries' and keys' and the values', where they come of "
        "Linear layers with nothing between",
        choice(*ATTENTION),
    )
    then: tuple[Refinement, ...] = ()
    calibration_size: int = setting(1024, "unlabelled images to look at, drawn by seed", whole(1))
    calibration_steps: int = setting(
        10, "steps of each synthetic image towards the statistics in the BatchNorms; 0 for none", whole(0)
    )
    seed: int = setting(0, "of whatever is drawn", whole(0))

    def __post_init__(self) -> None:
        for own in fields(self):
            own.metadata.get("values", Values()).check(own.name, getattr(self, own.name))
        for kind, part in [(Method, self.method), (Criterion, self.criterion), (Budget, self.budget)]:
            check_part(kind, part)
        for part in self.then:
            check_part(Refinement, part)
        for name in self.sites or ():
            if not isinstance(name, str):
                raise InputError(f"sites {name!r}: give names of layers, or patterns of them")

    @classmethod
    def of(
        cls,
        method: str | Method = "merge",
        criterion: str | Criterion = "auto",
        *,
        budget: Budget | None = None,
        then: Sequence[Refinement] = (),
        **given: Any,
    ) -> "Recipe":
        """The recipe that loose settings describe, by the names of `settings()`.

        Settings of methods, criteria and budgets that are not asked for have no say, but must be valid. What is `auto`
        has its default; the criterion `auto` is `l2-norm` where the method looks at no images.

        Raises:
            InputError: a setting that is not known or out of its range, or several budgets.
        """
        known = settings()
        given = {name: value for name, value in given.items() if not is_auto(value)}
        for name, value in given.items():
            choice(*known).check("setting", name)
            check_given(known[name], value)
        if given.get("effort"):
            if (method, criterion) != ("merge", "auto"):
                raise InputError(f"effort {given['effort']!r} chooses method and criterion: leave them away, or it")
            given = EFFORTS[given["effort"]] | given
            method, criterion = given.pop("method"), given.pop("criterion")
        budgets = [*asked_for(Budget, given), *([budget] if budget is not None else [])]
        if len(budgets) > 1:
            raise InputError("give one of widths, target_parameters, target_macs, target_latency and budget")
        own = {each.name: given[each.name] for each in fields(cls) if each.name in given}
        if isinstance(own.get("sites"), str):
            own["sites"] = (own["sites"],)
        method = method if isinstance(method, Method) else Method.find(method).make(given)
        if criterion == Auto.name and not method.looks:
            criterion = L2Norm.name
        return cls(
            method=method,
            criterion=criterion if isinstance(criterion, Criterion) else Criterion.find(criterion).make(given),
            budget=budgets[0] if budgets else Ratio.make(given),
            then=(*then, *asked_for(Refinement, given)),
            **own,
        )

    @property
    def looks(self) -> str:
        """What needs calibration images; empty if nothing does."""
        parts = [self.method, self.criterion, *self.then, self.budget]
        return next((part.title for part in parts if part.looks), "")

    @property
    def trains(self) -> bool:
        """Whether it takes all training images."""
        return any(part.trains for part in self.then)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {own.name: plain(getattr(self, own.name)) for own in fields(self)}

    def flat(self) -> dict[str, Any]:
        """All settings in one dictionary, by the names of `settings()`."""
        own = self.to_dict()
        parts = [self.method, self.criterion, self.budget, *self.then]
        found = {name: value for part in parts for name, value in part.flat().items()}
        return found | {name: own[name] for name in settings_of(Recipe)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_dict` described.

        Raises:
            InputError: a part that is not known here, as one of the user's own is before its file is imported.
        """
        rest = dict(data)
        parts = {each.kind: each.from_dict(rest.pop(each.kind)) for each in (Method, Criterion, Budget)}
        then = tuple(Refinement.from_dict(each) for each in rest.pop("then"))
        return cls(**parts, then=then, **rest)


def check_part(kind: type, part: object) -> None:
    """Raise `InputError` for what is no method, criterion, budget or refinement."""
    if not isinstance(part, kind):
        raise InputError(f"{kind.kind} {part!r} is a {type(part).__name__}: give a {kind.__name__}")


def settings() -> dict[str, Field]:
    """Every setting of every part that is known, by name: the one list of them."""
    methods = [part for kind in (Method, Criterion, Refinement) for part in kind.known.values()]
    return settings_of(*Budget.known.values(), Recipe, Effort, *methods)


def takes_settings(cls: type) -> type:
    """Spell out what a class's `**settings` are, in its signature and its docstring's line `settings: ...`.

    So that `help`, jsonargparse and the documentation know them.
    """
    signature, lines = inspect.signature(cls.__init__), []
    parameters = {name: own for name, own in signature.parameters.items() if name != "settings"}
    for name, own in settings().items():
        type_, default = own.type, default_of(own)
        if own.metadata["auto"]:
            type_, default = type_ | Literal["auto"], AUTO
        elif default is None:
            type_ = type_ | None
        if name in parameters and parameters[name].annotation is not Any:
            type_ = parameters[name].annotation  # the class takes more
        parameters[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type_)
        lines.append(f"        {name}: {own.metadata['help']}.")
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if "ratio" in signature.parameters:
        parameters["ratio"] = parameters["ratio"].replace(kind=positional)
    cls.__init__.__signature__ = signature.replace(parameters=list(parameters.values()))
    cls.__doc__ = re.sub(r"^ *settings: .*$", "\n".join(lines), cls.__doc__, flags=re.MULTILINE)
    return cls
