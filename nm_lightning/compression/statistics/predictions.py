"""A network's predictions, for whatever compares them."""

from torch import Tensor

from nm_lightning.errors import InputError


def check_logits(logits: object) -> Tensor:
    """The logits `(N, ..., classes)` themselves.

    Raises:
        InputError: the network gives something else.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network gives {kind}: criterion output, targets and finetune need logits (N, classes)")
    return logits
