"""Merge half of every layer of torchvision's VGG-16 for ImageNet (138 M parameters): seconds and peak memory.

    python benchmarks/merge_vgg16_imagenet.py

Peak memory is the kernel's high-water mark (Linux); it counts the original network too.
"""

import gc
import time
from pathlib import Path

import torch
import torchvision
from merge_vgg16 import memory
from torch import nn

from nm_lightning import compress


def main() -> None:
    """Measure once."""
    compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))  # loads the libraries' code
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    model = torchvision.models.vgg16(init_weights=False).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    start = time.perf_counter()
    result = compress(model, torch.zeros(1, 3, 224, 224), "merge", ratio=0.5)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    left = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in model.parameters())
    print(f"{len(result.report.sites)} sites, {left:.0%} of the parameters left, {seconds:.1f} s")
    print(f"peak memory {peak / 1e6:.0f} MB, {peak / size:.2f} times the weights' {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
