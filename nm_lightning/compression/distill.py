"""Fine-tuning without labels: the narrow network learns the original's predictions on calibration images."""

from collections.abc import Sequence

import torch
from rich import get_console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression.follow import BATCH_NORMS
from nm_lightning.compression.prepare import modes_kept
from nm_lightning.compression.ranks import ALONE, Ranks
from nm_lightning.errors import InputError

RATE = 3e-4  # of Adam, at the start; it falls to zero along a cosine
TEMPERATURE = 2.0


def check_logits(logits: object) -> Tensor:
    """The logits `(N, ..., classes)` themselves.

    Raises:
        InputError: the network gives something else.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network gives {kind}: criterion output, targets and finetune need logits (N, classes)")
    return logits


def distill(
    narrow: nn.Module,
    original: nn.Module,
    batches: Sequence[Tensor],
    epochs: int,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> None:
    """Train `narrow` in place on the Kullback-Leibler divergence from `original`'s softened predictions.

    After Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. BatchNorms keep their statistics.

    Args:
        narrow: the compressed network; parameters that ask for no gradient stay.
        original: the network as it was, in evaluation mode; it is only read.
        batches: images as the network reads them.
        epochs: passes over them.
        seed: of the batches' order.
        ranks: that each have a share of the images; a step takes one batch from each.
    """
    wanted = [parameter for parameter in narrow.parameters() if parameter.requires_grad]
    if not epochs or not wanted:
        return
    with torch.no_grad():
        targets = [(check_logits(original(images.clone())) / TEMPERATURE).log_softmax(dim=-1) for images in batches]
    optimiser = torch.optim.Adam(wanted, lr=RATE)
    (steps,) = ranks.total(torch.tensor(len(batches), device=batches[0].device))
    steps = -(-int(steps) // ranks.size)  # of an epoch, the same on every rank
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    order = [index for _ in range(epochs) for index in torch.randperm(steps, generator=generator).tolist()]
    learner = narrow
    if ranks.size > 1:
        learner = nn.parallel.DistributedDataParallel(narrow, find_unused_parameters=True)
    device = batches[0].device
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with modes_kept(narrow), torch.enable_grad(), forked:
        narrow.train()
        for module in narrow.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        torch.manual_seed(seed)  # of dropout
        for index in track(order, "distilling", transient=True, disable=not get_console().is_terminal):
            index %= len(batches)
            predicted = (learner(batches[index].clone()) / TEMPERATURE).log_softmax(dim=-1)
            loss = F.kl_div(predicted, targets[index], reduction="batchmean", log_target=True)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    optimiser.zero_grad(set_to_none=True)
