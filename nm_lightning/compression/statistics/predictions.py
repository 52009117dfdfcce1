"""A network's predictions, for whatever compares them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.batches import logits_of
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import evaluated
from nm_lightning.compression.structure.inputs import Inputs, call, clone, length
from nm_lightning.errors import InputError


def check_logits(logits: object) -> Tensor:
    """The logits `(N, ..., classes)` in a network's output.

    Raises:
        InputError: the network gives something else.
    """
    logits = logits_of(logits)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network gives {kind}: criterion output, targets and finetune need logits (N, classes)")
    return logits


@torch.no_grad()
def divergence(small: nn.Module, subject: Subject, batches: Sequence[Inputs] = ()) -> float:
    """How far a network's predictions are from the original's: Kullback-Leibler, in nats an image of all ranks'.

    Args:
        small: the network.
        subject: the original.
        batches: images; by default the last quarter of the subject's.

    Raises:
        InputError: there are no logits to compare.
    """
    batches = batches or subject.batches[-max(1, len(subject.batches) // 4) :]
    networks = evaluated(small), subject.evaluated
    pairs = [[check_logits(call(each, clone(x))).log_softmax(-1) for each in networks] for x in batches]
    lost = torch.stack([F.kl_div(*pair, reduction="sum", log_target=True) for pair in pairs]).sum()
    total, count = subject.ranks.total(lost, lost.new_tensor(float(sum(map(length, batches)))))
    return float(total) / float(count)
