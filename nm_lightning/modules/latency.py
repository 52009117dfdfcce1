"""How long a network takes for an image, on the device at hand."""

import timeit
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nm_lightning.compression.prepare import modes_kept

BATCHES = (1, 128)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for an image, in evaluation mode: the median of the runs and their quartiles."""

    batch: int
    median: float
    low: float
    high: float


def latency(model: nn.Module, example: Tensor, seconds: float = 1.0) -> list[Latency]:
    """Time a network at each of `BATCHES`, after a warm-up.

    Args:
        model: on the device where it is to be timed; its mode is restored.
        example: an input `(N, ...)` on that device; its first image is repeated.
        seconds: about so much for each batch size; slow networks run at least 5 times.
    """
    found = []
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in BATCHES:
            images = example[:1].expand(batch, *example.shape[1:]).contiguous()

            def once(images: Tensor = images) -> None:
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()

            timer = timeit.Timer(once)
            each = min(timer.repeat(repeat=3, number=1))  # the warm-up too
            number = max(1, round(seconds / 20 / each))
            repeat = min(20, max(5, round(seconds / each)))
            times = torch.tensor(timer.repeat(repeat, number)) * 1000 / number / batch
            low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            found.append(Latency(batch, median, low, high))
    return found
