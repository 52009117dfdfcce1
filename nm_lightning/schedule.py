"""When a network is compressed further as its training goes on, and how far."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytorch_lightning import Trainer

from nm_lightning.compression.selection import Ratio
from nm_lightning.compression.settings import whole
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.errors import InputError


def is_several(ratio: Any) -> bool:
    """Whether it is a list of ratios."""
    return isinstance(ratio, Sequence) and not isinstance(ratio, str)


class Schedule:
    """Ratios of the original widths, one after the other, each after so many epochs.

    Args:
        ratios: ascending.
        every_n_epochs: how many.

    Attributes:
        widths: by site, the survivors at each ratio; empty before training.
        done: how many of them were reached.

    Raises:
        InputError: there is no list of ratios, they do not ascend, or no number of epochs.
    """

    def __init__(self, ratios: Sequence[float], every_n_epochs: int | None):
        if not is_several(ratios) or not ratios:
            raise InputError("every_n_epochs goes with several ratios: give a list, such as [0.2, 0.35, 0.5]")
        if every_n_epochs is None:
            raise InputError(f"ratio {list(ratios)}: give every_n_epochs with several ratios, or one ratio")
        whole(1, "epochs").check("every_n_epochs", every_n_epochs)
        for ratio in ratios:
            Ratio(ratio)
        if list(ratios) != sorted(set(ratios)):
            raise InputError(f"ratio {list(ratios)}: give ascending ratios, each of the original widths")
        self.ratios, self.every_n_epochs = list(ratios), every_n_epochs
        self.widths: list[dict[str, int]] = []
        self.done = 0

    def check(self, max_epochs: int | None) -> None:
        """Raise `InputError` unless training goes on after the last ratio."""
        last = len(self.ratios) * self.every_n_epochs
        if max_epochs is not None and 0 <= max_epochs <= last:
            raise InputError(f"max_epochs {max_epochs}: the last ratio is reached after {last}: give more, to train it")

    def begin(self, budget: Ratio, subject: Subject, trainer: Trainer) -> None:
        """Note the widths at each ratio, of a network that is whole; one that is resumed has brought them."""
        if trainer.current_epoch == 0 or not self.widths:
            self.widths = [replace(budget, ratio=ratio).counts(subject) for ratio in self.ratios]
            self.done = 0

    def due(self, epoch: int) -> Mapping[str, int] | None:
        """The widths to be reached before an epoch, counted from 0; None where they are."""
        steps = min(len(self.ratios), epoch // self.every_n_epochs)
        if steps <= self.done:
            return None
        self.done = steps
        return self.widths[steps - 1]

    def state_dict(self) -> dict[str, Any]:
        """How far it has come."""
        return {"widths": self.widths, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        if state:
            self.widths, self.done = [dict(each) for each in state["widths"]], state["done"]
