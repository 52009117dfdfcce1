"""BatchNorm statistics estimated anew on calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nm_lightning.compression.report import Report
from nm_lightning.compression.settings import Refinement, setting
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import modes_kept, with_data
from nm_lightning.compression.structure.inputs import (
    Inputs,
    call,
    clone,
    dtype_of,
    joined,
    length,
    split,
    tensors_in,
    to,
)
from nm_lightning.compression.structure.operations import BATCH_NORMS
from nm_lightning.compression.structure.plan import Plan
from nm_lightning.errors import InputError


@dataclass(frozen=True)
class RecalibrateNorm(Refinement):
    """Estimates BatchNorm statistics anew; mostly it loses."""

    name, turn = "recalibrate_norm", 2
    on: bool = setting(
        True,
        "estimate BatchNorm statistics anew on the calibration images; mostly it loses",
        flag="recalibrate_norm",
        off=False,
    )

    def refine(self, subject: Subject, narrow: nn.Module, plan: Plan, report: Report) -> dict[str, Tensor]:
        """The norms' buffers."""
        learner = with_data(narrow)
        if self.on:
            recalibrate_norms(
                learner, [to(batch, dtype=dtype_of(subject.example)) for batch in subject.batches], subject.ranks
            )
        return dict(learner.named_buffers())


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Sequence[Inputs], ranks: Ranks = ALONE) -> None:
    """Estimate the running statistics of all BatchNorms anew on all ranks' images, in place."""
    (short,) = ranks.total(torch.tensor(sum(map(length, batches)) < 2, device=tensors_in(batches[0])[0].device).long())
    if short:
        raise InputError("recalibrate_norm: one image has no variance; give more calibration images")
    if any(length(batch) == 1 for batch in batches):
        batches = split(joined(batches), 2)
        batches[-2:] = [joined(batches[-2:])] if length(batches[-1]) == 1 else batches[-2:]
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    momenta = [(norm, norm.momentum) for norm in norms]
    with modes_kept(model):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the mean over all batches
        for batch in batches:
            call(model, clone(batch))
    count = norms[0].running_mean.new_tensor(len(batches)) if norms else None
    for norm, momentum in momenta:
        norm.momentum = momentum
        if ranks.size > 1:
            every, mean, var = ranks.total(count, norm.running_mean * count, norm.running_var * count)
            norm.running_mean.copy_(mean / every)
            norm.running_var.copy_(var / every)
