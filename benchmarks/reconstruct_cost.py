"""What `--method reconstruct` costs in forward passes, where its time goes, each part's floor, what ranks would send.

    python benchmarks/reconstruct_cost.py --checkpoints DIR            # ResNet-56 at 0.5, VGG-16 at the paper's widths

The split is torch's profiler's, by operation. A part's floor is its floating-point operations at the speed of this
machine's matrix product; the selection by norm takes no measurable time. The bytes that ranks sum up are counted at
the place where they would be sent, and set beside the formula of docs/scale.md.
"""

import argparse
import time
from pathlib import Path

import torch
from beyond_paper import Bench
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nm_lightning import compress, trace
from nm_lightning.compression import cost
from nm_lightning.compression.methods import reconstruct as engine
from nm_lightning.compression.statistics.patches import ENOUGH

PARTS = {
    "forward passes": ("aten::mkldnn_convolution", "aten::native_batch_norm", "aten::addmm", "aten::clamp_min"),
    "patches": ("aten::cat", "aten::copy_", "aten::index_select", "aten::index", "aten::masked_fill_"),
    "Gram products and cross-moments": ("aten::bmm",),
    "solves": ("aten::linalg_cholesky_ex", "aten::cholesky_solve", "aten::_cholesky_solve_helper"),
}


class Counting:
    """A strategy that sends nothing, and counts."""

    world_size, global_rank = 2, 0

    def __init__(self) -> None:
        self.bytes = self.calls = 0

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        """The tensor itself."""
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1
        return tensor

    def broadcast(self, value: object) -> object:
        """The value itself."""
        return value


def speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product."""
    matrix = torch.randn(1536, 1536, dtype=dtype)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(5):
        matrix @ matrix
    return 5 * 2 * 1536**3 / (time.perf_counter() - start)


def floors(tasks: list[tuple], images: int, forward: float) -> tuple[dict[str, float], int]:
    """Seconds at least for each part, and the bytes to sum: Gram once, cross-moments each round, two scalars."""
    single, double = speed(torch.float32), speed(torch.float64)
    looked_at = [min(images * places, ENOUGH * width) for width, _, _, places, _ in tasks]
    sizes = list(zip(looked_at, tasks, strict=True))
    gram = sum(rows * width**2 * groups for rows, (width, groups, _, _, _) in sizes)  # one half: it is symmetric
    cross = sum(2 * rows * width * out * (2 * rounds) for rows, (width, _, out, _, rounds) in sizes)  # and the values
    solves = sum(
        groups * (width**3 / 3 + 2 * width**2 * out / groups * rounds) for width, groups, out, _, rounds in tasks
    )
    sent = sum(8 * (groups * width**2 + rounds * width * out + 2) for width, groups, out, _, rounds in tasks)
    seconds = {"forward passes": forward / single, "Gram products and cross-moments": (gram + cross) / single}
    return seconds | {"solves": solves / double}, sent + 8  # and the number of images


def forwards(bench: Bench, ratio: float = 0.5, count: int = 512, refit: int = 0) -> list[tuple]:
    """Rows `(work, ours, alternative, ratio)`: CPU seconds against a pass of the original and the small network."""
    images = bench.calibration("data", 0)[:count]
    small = compress(bench.model, images[:1], "prune", ratio=ratio).model

    @torch.no_grad()
    def both() -> None:
        for batch in images.split(128):
            bench.model(batch), small(batch)

    def seconds(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def ours() -> None:
        compress(bench.model, images[:1], "reconstruct", ratio=ratio, calibration=images, refit=refit)

    before, own, after = sorted(seconds(both) for _ in range(3))[1], seconds(ours), seconds(both)
    forward = (before + after) / 2
    work = f"reconstruct, {bench.name}, {ratio}, {len(images)} images" + (f", refit {refit}" if refit else "")
    return [(work, own, forward, own / forward)]


def measure(name: str, cell: float | str, checkpoints: Path, data_dir: Path) -> str:
    """A table in Markdown."""
    bench = Bench(name, checkpoints, data_dir)
    images = bench.calibration("data", 0)
    size = {"ratio": cell} if isinstance(cell, float) else {}
    size = bench.defaults | size
    tasks, solve = [], engine.solve_layer

    def noted(task, join, wide, *more):
        layer = wide.get_submodule(task.layer)
        groups, taps = getattr(layer, "groups", 1), layer.weight[0, 0].numel()
        width = taps * int(task.stays.sum()) // groups + 1
        out = int(task.rows.sum()) if groups == 1 else len(layer.weight)  # those that stay are solved
        tasks.append([width, groups, out, task.layer, 1 + (more[3] if join.limit is not None else 0)])
        return solve(task, join, wide, *more)

    engine.solve_layer = noted
    counting = Counting()
    start = time.perf_counter()
    compress(bench.model, images[:1], "reconstruct", calibration=images, **size)
    seconds = time.perf_counter() - start
    engine.solve_layer = solve
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        compress(bench.model, images[:1], "reconstruct", calibration=images, strategy=counting, **size)
    times = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    places = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: places.update({name: out[0, 0].numel()}))
        for name, layer in bench.model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        bench.model(images[:1])
    for hook in hooks:
        hook.remove()
    wide = 2 * 2 * cost(bench.model, images[:1]).macs * len(images)  # the original and the copy, each once
    least, sent = floors(
        [(width, groups, out, places[layer], rounds) for width, groups, out, layer, rounds in tasks], len(images), wide
    )
    lines = ["| part | seconds | share | floor |", "| --- | ---: | ---: | ---: |"]
    total, named = sum(times.values()), 0.0
    for part, keys in PARTS.items():
        own = sum(times.get(key, 0) for key in keys)
        floor = f"{least[part]:.1f}" if part in least else ""
        lines.append(f"| {part} | {own:.1f} | {own / total:.0%} | {floor} |")
        named += own
    lines.append(f"| all else | {total - named:.1f} | {(total - named) / total:.0%} | |")
    start = time.perf_counter()
    trace(bench.model, images[:1])
    traced = time.perf_counter() - start
    return "\n".join(
        [
            f"{name}, {cell}, {len(images)} images: {seconds:.1f} s, of which tracing {traced:.2f} s; "
            f"{len(tasks)} layers solved.",
            f"Summed over ranks: {counting.bytes / 1e6:.1f} MB in {counting.calls} reductions; by the formula "
            f"{sent / 1e6:.1f} MB.",
            "",
            *lines,
        ]
    )


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="the published files")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    args = parser.parse_args()
    bench = Bench("resnet56", args.checkpoints, args.data_dir)
    for refit in (0, 1):
        for work, own, forward, ratio in forwards(bench, refit=refit):
            print(f"{work}: {own:.1f} s of CPU, {ratio:.1f} forwards of {forward:.2f} s", flush=True)
    for name, cell in (("resnet56", 0.5), ("vgg16", "published widths")):
        print(measure(name, cell, args.checkpoints, args.data_dir), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
