"""In which precision to train: whichever of two is faster on this machine, by the clock."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FULL, MIXED = "32-true", "bf16-mixed"  # as Lightning's Trainer calls them
STEPS = 3  # of each, after one to warm up; the fastest counts
GAIN = 1.05  # what the mixed one must be faster by


def faster(model: nn.Module, images: Tensor, device: str) -> tuple[str, str]:
    """Time a training step in float32 and under bfloat16 autocast.

    Args:
        model: maps images to logits; a copy of it is used.
        images: a batch `(N, C, H, W)` of the size that training will have.
        device: `cpu` or `cuda`.

    Returns:
        The Trainer's name of the faster one, and a line that says why.
    """
    learner = copy.deepcopy(model).to(device).train()
    images = images.to(device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)

    def step(mixed: bool) -> Callable[[], None]:
        def once() -> None:
            with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed):
                F.cross_entropy(learner(images), labels).backward()
            if device == "cuda":
                torch.cuda.synchronize()

        return once

    with torch.random.fork_rng([device] if device == "cuda" else []):  # dropout draws
        full, mixed = (_seconds(step(kind)) for kind in (False, True))
    chosen = MIXED if full > GAIN * mixed else FULL
    said = f"a step takes {1000 * full:.0f} ms in float32, {1000 * mixed:.0f} ms in bfloat16"
    return chosen, f"precision {chosen}: {said}, {len(images)} images"


def _seconds(once: Callable[[], None]) -> float:
    """The least of some runs."""
    times = []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
