"""Settings as data: a part of a recipe is a frozen dataclass whose fields say what they mean and what they may be.

Whoever needs the settings reads them here: `compress`, the callback, compress.py's flags and their help, reports and
checkpoints. A method, criterion, budget or refinement makes itself known by having a `name`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from nm_lightning.errors import InputError

AUTO = "auto"  # a setting that is left to the paper's preset of a network and its data, or else to its default

ASKED_BY_NAME = ("method", "criterion")  # the other kinds of part are asked for by a setting of theirs

T = TypeVar("T", bound="Part")


def is_auto(value: Any) -> bool:
    """Whether a setting is left to presets and defaults."""
    return isinstance(value, str) and value == AUTO


@dataclass(frozen=True)
class Values:
    """What a setting may be: what a message tells to give, which values are allowed, and all of them if words."""

    says: str = ""
    allow: Callable[[Any], bool] = lambda value: True
    choices: Sequence[str] = ()

    def check(self, label: str, value: Any) -> None:
        """Raise `InputError` unless a value is one of them."""
        if not self.allow(value):
            if self.choices:
                raise InputError(f"unknown {label} {value!r}: choose from {', '.join(self.choices)}")
            raise InputError(f"{label} {value!r}: give {self.says}")


def is_number(value: Any) -> bool:
    """Whether it is a finite integer or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != float("inf")


def number(low: float, high: float = float("inf")) -> Values:
    """A number from `low` to `high`."""
    says = f"a number from {low:g}" + ("" if high == float("inf") else f" to {high:g}")
    return Values(says, lambda value: is_number(value) and low <= value <= high)


def whole(low: int, unit: str = "") -> Values:
    """A whole number from `low`."""
    says = f"a whole number{f' of {unit}' if unit else ''} from {low}"
    return Values(says, lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low)


def choice(*choices: str) -> Values:
    """One of some words."""
    return Values(allow=lambda value: value in choices, choices=choices)


def setting(
    default: Any, help: str, values: Values = Values(), *, flag: str = "", off: Any = MISSING, auto: bool = False
) -> Any:
    """A field of a part.

    Args:
        default: its value where none is given.
        help: a line for people.
        values: what it may be.
        flag: its name among the settings of all parts; its own name if empty.
        off: the value by which the part that has it is not asked for.
        auto: whether the paper's presets may say it.
    """
    return field(default=default, metadata={"help": help, "values": values, "flag": flag, "off": off, "auto": auto})


def flag_of(own: Field) -> str:
    """The name that a field has among the settings of all parts."""
    return own.metadata.get("flag") or own.name


@dataclass(frozen=True)
class Part:
    """A method, criterion, budget or refinement: plain data, in a class that knows what to do with it.

    Attributes:
        name: what a recipe calls it; a class that has one is known by it from then on.
        looks: whether it needs calibration images.
        kind: what it is.
        known: the classes of its kind by name.
    """

    name: ClassVar[str] = ""
    looks: ClassVar[bool] = False
    kind: ClassVar[str]
    known: ClassVar[dict[str, type["Part"]]]

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.known[cls.name] = cls

    def __post_init__(self) -> None:
        for own in fields(self):
            own.metadata["values"].check(flag_of(own), getattr(self, own.name))

    @property
    def label(self) -> str:
        """Its name; its class's where it has none."""
        return self.name or type(self).__name__

    @property
    def title(self) -> str:
        """What a message calls it: as it was asked for."""
        return f"{self.kind} {self.label}" if self.kind in ASKED_BY_NAME else next(iter(self.flat()), self.label)

    def flat(self) -> dict[str, Any]:
        """Its settings by the names that they have among all, as plain values."""
        return {flag_of(own): plain(getattr(self, own.name)) for own in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Its name and settings, as plain values."""
        return {"name": self.label} | {own.name: plain(getattr(self, own.name)) for own in fields(self)}

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """The part that `to_dict` described.

        Raises:
            InputError: nothing of that name is known here.
        """
        return cls.find(data["name"])(**{name: value for name, value in data.items() if name != "name"})

    @classmethod
    def find(cls: type[T], name: str) -> type[T]:
        """The class of this kind that has a name."""
        choice(*cls.known).check(cls.kind, name)
        return cls.known[name]

    @classmethod
    def make(cls: type[T], given: Mapping[str, Any]) -> T:
        """One with the settings that it has among those given."""
        return cls(**{own.name: given[flag_of(own)] for own in fields(cls) if flag_of(own) in given})


class Method(Part):
    """What becomes of the removed neurons.

    A subclass has `decompose(subject, keeps)`, which changes nothing and gives a `Decomposition`: of the network, its
    sites and images (a `Subject`), where of each site by name the neurons `(k,)` stay.
    """

    kind, known = "method", {}


class Criterion(Part):
    """Which neurons stay.

    A subclass has `scores(site, subject)`, how much each of a site's neurons should stay `(n,)`; or a `choose` of its
    own.
    """

    kind, known = "criterion", {}

    def choose(self, subject: Any, counts: Mapping[str, int], method: Method) -> dict[str, Any]:
        """By site, the survivors `(k,)`: of a `Subject`, so many as `counts` says, where `method` treats the others."""
        scores = {site.name: self.scores(site, subject).cpu() for site in subject.sites}
        return {site.name: site.survivors(scores[site.name], counts[site.name]) for site in subject.sites}


class Budget(Part):
    """How many neurons stay.

    A subclass has `counts(subject)`, the number of survivors of each site of a `Subject` by name.
    """

    kind, known = "budget", {}

    def check(self, subject: Any) -> None:
        """Raise `InputError` where it does not fit a `Subject`, before its images are looked at."""
        if not self.looks:
            self.counts(subject)

    @property
    def share_removed(self) -> float | None:
        """The one ratio that it removes of every site; None where there is none."""
        return None

    @property
    def says(self) -> str:
        """A word for titles and file names."""
        return self.label if self.share_removed is None else f"{self.share_removed:g}"


class Refinement(Part):
    """What follows a method.

    A subclass has `refine(subject, narrow, plan, report)`: new values for some tensors of the narrow network, by name.
    It changes nothing but the report, which takes remarks.

    Attributes:
        turn: which comes first where settings ask for several.
    """

    kind, known = "refinement", {}
    looks = True
    turn: ClassVar[int] = 0

    @property
    def trains(self) -> bool:
        """Whether it takes all training images, and not the calibration images."""
        return False


def settings_of(*parts: type) -> dict[str, Field]:
    """All settings of some dataclasses, by name; the first that has a setting describes it."""
    found: dict[str, Field] = {}
    for own in (own for part in parts for own in fields(part) if "help" in own.metadata):
        found.setdefault(flag_of(own), own)
    return found


def default_of(own: Field) -> Any:
    """A setting's value where nobody says it."""
    return own.default if own.metadata["off"] is MISSING else own.metadata["off"]


def check_given(own: Field, value: Any) -> None:
    """Raise `InputError` unless a value asks for nothing or is allowed."""
    if own.metadata["off"] is MISSING or value != own.metadata["off"]:
        own.metadata["values"].check(flag_of(own), value)


def asked_for(kind: type[T], given: Mapping[str, Any]) -> Iterator[T]:
    """The parts of a kind that a setting asks for."""
    for part in sorted(kind.known.values(), key=lambda part: getattr(part, "turn", 0)):
        switches = [own for own in fields(part) if own.metadata["off"] is not MISSING]
        if any(given.get(flag_of(own), default_of(own)) != default_of(own) for own in switches):
            yield part.make(given)


def plain(value: Any) -> Any:
    """A value as JSON has it; a function goes by its name."""
    if isinstance(value, Part):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value
