"""Merge all 13 convolutions of VGG-16 at the paper's widths: tensor code against the paper's literal loops.

    python benchmarks/merge_vgg16.py

Times the whole of `compress` (copy, trace, choose, decompose, narrow) in one process, and reads the peak memory of the
tensor code from the kernel's high-water mark (Linux), which counts the original network too.
"""

import gc
import re
import time
from pathlib import Path

import torch
from torch import nn

from nm_lightning import compress
from nm_lightning.models import build_model
from nm_lightning.presets import preset

REPEATS = 5


def memory(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def vgg16() -> nn.Module:
    """Random weights, BatchNorm statistics that are not trivial."""
    torch.manual_seed(0)
    model = build_model("vgg16", 10, (3, 32, 32)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def merge(model: nn.Module, implementation: str) -> tuple[float, nn.Module]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = compress(
        model,
        torch.zeros(1, 3, 32, 32),
        **preset("vgg16", "cifar10"),
        implementation=implementation,
    )
    return time.perf_counter() - start, result.model


def main() -> None:
    small = build_model("vgg11", 10, (3, 32, 32), widths=[16] * 9).eval()
    compress(small, torch.zeros(1, 3, 32, 32))  # loads the libraries' code
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    model = vgg16()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    _, narrow = merge(model, "fast")
    peak = memory("VmHWM") - before
    print(f"peak memory {peak / 1e6:.0f} MB, {peak / size:.2f} times the network's {size / 1e6:.0f} MB")

    seconds = sorted(merge(model, "fast")[0] for _ in range(REPEATS))
    fast = seconds[len(seconds) // 2]
    print(f"tensor code {fast:.3f} s (median of {REPEATS}, {seconds[0]:.3f} to {seconds[-1]:.3f})")
    slow, oracle = merge(model, "reference")
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        gap = (narrow(images) - oracle(images)).abs().max().item()
    print(f"literal loops {slow:.1f} s: {slow / fast:.0f} times as long; largest difference of the outputs {gap:.1e}")


if __name__ == "__main__":
    main()
