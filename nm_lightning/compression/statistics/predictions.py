"""A network's predictions, for whatever compares them."""

from torch import Tensor

from nm_lightning.batches import logits_of
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
