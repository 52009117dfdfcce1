"""What people wait for, each against its alternative in the same run: one table.

    python benchmarks/performance.py                             # what needs no files; `make benchmark`
    python benchmarks/performance.py --checkpoints DIR           # also reconstruct and refit, published ResNet-56

CPU seconds (user and system), so that other work on the machine counts for little; torch computes on one thread. Rows
against torch-pruning need `pip install torch-pruning`. docs/performance.md holds a table that was measured.
"""

import argparse
import gc
import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from merge_vgg16 import memory, merge, vgg16
from own_checkpoints import machine
from torch import nn

from nm_lightning import compress
from nm_lightning.models import build_model

ROOT = Path(__file__).parent.parent
REPEATS = 3
PRUNED = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "vgg11", "densenet121", "efficientnet_b0",
    "convnext_tiny",
)  # fmt: skip
Row = tuple[str, float, str, float]  # the work, its seconds, the alternative, its seconds


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least CPU time of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def process(*words: str) -> float:
    """The least CPU time of a Python process."""
    times = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def start_up() -> Iterator[Row]:
    """What passes before anything happens."""
    bare, lightning = process("-c", "import torch"), process("-c", "import torch, pytorch_lightning")
    yield "compress.py --help", process("compress.py", "--help"), "import torch", bare
    yield "import nm_lightning", process("-c", "import nm_lightning"), "import torch", bare
    yield "from nm_lightning import compress", process("-c", "from nm_lightning import compress"), "import torch", bare
    with tempfile.TemporaryDirectory() as folder:
        torch.save(build_model("lenet_300_100", 10, (1, 8, 8)).state_dict(), f"{folder}/lenet.pt")
        words = ["--checkpoint", f"{folder}/lenet.pt", "--model", "lenet_300_100", "--data", "digits", "--quiet"]
        first = process("compress.py", *words, "--output", f"{folder}/out")
    yield "first row of a LeNet grid", first, "import torch and Lightning", lightning


def merging() -> Iterator[Row]:
    """All 13 convolutions of VGG-16 at the paper's widths by tensor code and by the paper's loops."""
    model = vgg16()
    merge(model, "fast")
    start = time.process_time()
    merge(model, "reference")
    slow = time.process_time() - start
    yield "merge, VGG-16", seconds(lambda: merge(model, "fast")), "the paper's literal loops", slow


def evaluating() -> Iterator[Row]:
    """ResNet-56 over 256 images in either layout."""
    model, images = build_model("resnet56", 10, (3, 32, 32)).eval(), torch.randn(256, 3, 32, 32)
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(last)
        yield (
            "evaluating, ResNet-56, channels last",
            seconds(lambda: model(last)),
            "channels first",
            seconds(lambda: model(images)),
        )


def pruning() -> Iterator[Row]:
    """Half of everything, scope `all`."""
    if importlib.util.find_spec("torch_pruning") is None:
        return
    from zoo import torch_pruning

    for name in PRUNED:
        model, images = torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)
        taken: list[float] = []

        def timer(work: Callable[[], nn.Module], taken: list[float] = taken) -> tuple[float, nn.Module]:
            taken.append(seconds(work, 2))
            return taken[-1], work()

        torch_pruning(model, images.repeat(2, 1, 1, 1), timer)
        ours = seconds(lambda: compress(model, images, "prune", ratio=0.5, scope="all"), 2)  # noqa: B023 - called here
        yield f"prune, {name}", ours, "torch-pruning", taken[0]


def solving(checkpoints: Path, data_dir: Path) -> Iterator[Row]:
    """Reconstruct and refit over a pass of the original and of the half as large network."""
    from reconstruct_cost import Bench, forwards

    bench = Bench("resnet56", checkpoints, data_dir)
    for refit in (0, 1):
        for work, own, forward, _ in forwards(bench, refit=refit):
            yield work, own, "a pass of both networks", forward


def peak() -> str:
    """Seconds and memory of ImageNet's VGG-16, whose high-water mark the kernel keeps (Linux)."""
    compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))  # loads the libraries' code
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    model = torchvision.models.vgg16(init_weights=False).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    start = time.process_time()
    compress(model, torch.zeros(1, 3, 224, 224), "merge", ratio=0.5)
    taken = time.process_time() - start
    most = memory("VmHWM") - before
    return (
        f"Half of every layer of torchvision's VGG-16, 138 M parameters, merged: {taken:.1f} s, peak memory "
        f"{most / size:.2f} times the weights' {size / 1e6:.0f} MB, the original included."
    )


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="the published files")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    said = peak()
    print("| work | CPU s | against | CPU s | ratio |\n| --- | ---: | --- | ---: | ---: |")
    parts = [start_up, merging, evaluating, pruning]
    if args.checkpoints:
        parts.append(lambda: solving(args.checkpoints, args.data_dir))
    for part in parts:
        for work, own, against, other in part():
            print(f"| {work} | {own:.3g} | {against} | {other:.3g} | {own / other:.3g} |", flush=True)
    abilities = torch.backends.cpu.get_cpu_capability()
    print(f"\n{said}\n\nMachine: {machine()}, {abilities}, one thread.")


if __name__ == "__main__":
    main()
