"""What makes a LightningModule's compressed checkpoints load by themselves: one line, and what it was built with."""

from typing import Any

from nm_lightning.compression.files.checkpoint import PLAN_KEY
from nm_lightning.compression.files.inert import plain_data
from nm_lightning.compression.structure.copies import make_plain
from nm_lightning.compression.structure.plan import Plan, apply_plan, compose


class Compressible:
    """Mixin for a LightningModule: its checkpoints carry the plan, and loading one narrows the module first.

        class MyModule(Compressible, LightningModule): ...

    `MyModule.load_from_checkpoint("compressed.ckpt")` then gives the narrow network, and training it further saves
    checkpoints that load the same way.

    Attributes:
        compression_plan: what was cut from the architecture that `__init__` builds; empty for the whole one.
    """

    compression_plan: Plan = {}  # noqa: RUF012 - replaced, never changed in place

    def narrowed(self, plan: Plan) -> None:
        """Note that the module was compressed by `plan`, after whatever was cut before."""
        self.compression_plan = compose(self.compression_plan, plan)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the plan beside the weights."""
        if self.compression_plan:
            checkpoint[PLAN_KEY] = self.compression_plan

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Narrow a whole module to the checkpoint's plan; one that is narrow already must match it."""
        plan = checkpoint.get(PLAN_KEY, {})
        if plan != self.compression_plan:
            make_plain(self)  # as compressed weights are
            apply_plan(self, plan)
            self.compression_plan = plan


def arguments_of(module: Any, data: Any = None) -> tuple[dict[str, Any], list[str]]:
    """What a module and its data were built with, as Lightning's checkpoints hold it, and lines on what was left out.

    Args:
        module: a LightningModule.
        data: a LightningDataModule, where there is one.
    """
    hparams, found, notes = {"hyper_parameters": module.hparams}, {}, []
    if data is not None:
        hparams["datamodule_hyper_parameters"] = data.hparams
    for name, values in hparams.items():
        found[name], left_out = plain_data(values)
        if left_out:
            found[f"{name}_left_out"] = left_out
        notes += [f"{name}: {each} is no plain data, and left out of the checkpoint" for each in left_out]
    if getattr(module, "_hparams_name", None):
        found["hparams_name"] = module._hparams_name
    return found, notes
