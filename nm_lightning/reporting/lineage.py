"""Which runs a network comes from: each logger's name and id, in its checkpoints and in every report of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

RUNS_KEY = "training_runs"  # in a checkpoint


def runs_of(loggers: Iterable[Any]) -> list[dict[str, str]]:
    """What each logger calls its run: for W&B and MLflow the run's id, for others the version's number.

    >>> from pytorch_lightning.loggers import CSVLogger
    >>> runs_of([CSVLogger("runs", "lenet", version=3)])
    [{'logger': 'CSVLogger', 'name': 'lenet', 'id': '3'}]
    """
    return [
        {"logger": type(logger).__name__, "name": str(logger.name), "id": str(logger.version)} for logger in loggers
    ]


def known_runs(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The runs that a checkpoint names, the first training first; none where it names none."""
    found = content.get(RUNS_KEY)
    return [dict(run) for run in found if isinstance(run, dict)] if isinstance(found, list) else []


class Lineage(Callback):
    """A run's checkpoints name the run, after those that it started from.

    Args:
        before: the runs of the checkpoint that it started from.
    """

    def __init__(self, before: Iterable[Mapping[str, str]] = ()):
        self.before = [dict(run) for run in before]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the runs beside the weights."""
        checkpoint[RUNS_KEY] = [*self.before, *runs_of(trainer.loggers)]
