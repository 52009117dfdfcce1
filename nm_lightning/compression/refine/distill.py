"""Fine-tuning without labels: the narrow network learns the original's predictions on calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression.report import Report
from nm_lightning.compression.settings import Refinement, setting, whole
from nm_lightning.compression.statistics.predictions import check_logits
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import evaluated, modes_kept, with_data
from nm_lightning.compression.structure.inputs import Inputs, call, clone, tensors_in, to
from nm_lightning.compression.structure.operations import BATCH_NORMS
from nm_lightning.compression.structure.plan import Plan, learned
from nm_lightning.progress import progress

RATE = 3e-4  # of Adam, at the start; it falls to zero along a cosine
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Distill(Refinement):
    """Trains the narrow network on the original's predictions for the calibration images, without labels."""

    name, turn = "finetune", 3
    epochs: int = setting(
        1,
        "epochs of training on the original's predictions for the calibration images, no labels",
        whole(0, "epochs"),
        flag="finetune",
        off=0,
    )

    def refine(self, subject: Subject, narrow: nn.Module, plan: Plan, report: Report) -> dict[str, Tensor]:
        """The narrow network's parameters and buffers, trained in a copy."""
        learner = with_data(narrow)
        floating = next(parameter.dtype for parameter in learner.parameters())
        seen = [to(batch, dtype=floating) for batch in subject.batches]
        distill(learner, evaluated(subject.model).to(floating), seen, self.epochs, subject.seed, subject.ranks)
        return learned(learner)


def distill(
    narrow: nn.Module,
    original: nn.Module,
    batches: Sequence[Inputs],
    epochs: int,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> None:
    """Train `narrow` in place on the Kullback-Leibler divergence from `original`'s softened predictions.

    After Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. BatchNorms keep their statistics.

    Args:
        narrow: the compressed network; parameters that ask for no gradient stay.
        original: the network as it was, in evaluation mode; it is only read.
        batches: inputs as the network is called with.
        epochs: passes over them.
        seed: of the batches' order.
        ranks: that each have a share of the images; a step takes one batch from each.
    """
    wanted = [parameter for parameter in narrow.parameters() if parameter.requires_grad]
    if not epochs or not wanted:
        return
    with torch.no_grad():
        targets = [(check_logits(call(original, clone(batch))) / TEMPERATURE).log_softmax(dim=-1) for batch in batches]
    optimiser = torch.optim.Adam(wanted, lr=RATE)
    device = tensors_in(batches[0])[0].device
    (steps,) = ranks.total(torch.tensor(len(batches), device=device))
    steps = -(-int(steps) // ranks.size)  # of an epoch, the same on every rank
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    order = [index for _ in range(epochs) for index in torch.randperm(steps, generator=generator).tolist()]
    learner = narrow
    if ranks.size > 1:
        learner = nn.parallel.DistributedDataParallel(narrow, find_unused_parameters=True)
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with modes_kept(narrow), torch.enable_grad(), forked:
        narrow.train()
        for module in narrow.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        torch.manual_seed(seed)  # of dropout
        for index in progress(order, "distilling"):
            index %= len(batches)
            predicted = (check_logits(call(learner, clone(batches[index]))) / TEMPERATURE).log_softmax(dim=-1)
            loss = F.kl_div(predicted, targets[index], reduction="batchmean", log_target=True)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    optimiser.zero_grad(set_to_none=True)
