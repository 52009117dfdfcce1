"""How much of the MACs removed is time saved: networks narrowed with and without `--round_to 8`, by three engines.

    python benchmarks/latency.py                       # what docs/latency.jsonl lacks; goes on where it was stopped
    python benchmarks/latency.py resnet56 --engine eager --batch 32
    python benchmarks/latency.py --table               # only docs/latency.md and the plot from the lines

Random weights, scope `all`: time does not depend on their values. CPU seconds on one thread, so that other work on the
machine counts for little; the original and all narrow ones take turns, and each one's least time of its turns counts.
The share realised is (1 - time left) / (1 - MACs left). onnxruntime and onnxscript are needed for the last engine.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.own_checkpoints import machine
from nm_lightning.compression import cost, export
from nm_lightning.compression.compress import Compressor
from nm_lightning.compression.recipe import Recipe
from nm_lightning.models import build_model

DOCS = Path(__file__).parent.parent / "docs"
SIZES = {"resnet56": 32, "vgg16": 32}  # ours, for CIFAR; the others are torchvision's
NETWORKS = ("resnet56", "vgg16", "mobilenet_v2", "efficientnet_b0", "resnet50", "vit_b_16")
ENGINES, BATCHES = ("eager", "onnxruntime", "compile"), (1, 32)
VARIANTS = {f"{ratio}{', multiples of 8' * (step > 1)}": (ratio, step) for ratio in (0.3, 0.5) for step in (1, 8)}
TURNS, LEAST = 5, 0.3  # of each network; seconds of a turn, at least


def network(name: str) -> tuple[nn.Module, int]:
    """A network with random weights, and the side of its images."""
    torch.manual_seed(0)
    if name in SIZES:
        return build_model(name, 10, (3, SIZES[name], SIZES[name])).eval(), SIZES[name]
    return torchvision.models.get_model(name).eval(), 224


def runner(model: nn.Module, images: Tensor, engine: str, folder: str) -> Callable[[], object]:
    """A forward pass over the images by an engine."""
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(export(model, images, f"{folder}/{id(model)}.onnx"))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, given)
    run = torch.compile(model) if engine == "compile" else model
    return lambda: run(images)


def turn(run: Callable[[], object]) -> float:
    """CPU seconds of a pass, the mean of as many as take a while."""
    start, count = time.process_time(), 0
    while time.process_time() - start < LEAST:
        run()
        count += 1
    return (time.process_time() - start) / count


@torch.inference_mode()
def measured(name: str, engine: str, batch: int) -> dict:
    """The MACs and the seconds of the original and of each narrow network."""
    model, side = network(name)
    images = torch.randn(batch, 3, side, side)
    compressor = Compressor(model, images[:2] if batch > 1 else images, Recipe.of("prune", ratio=0.5, scope="all"))
    networks = {"original": model} | {
        label: compressor(Recipe.of("prune", ratio=ratio, scope="all", round_to=step)).model
        for label, (ratio, step) in VARIANTS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = {label: runner(each, images, engine, folder) for label, each in networks.items()}
        for run in runs.values():
            run()
        times = {label: [] for label in runs}
        for _ in range(TURNS):
            for label, run in runs.items():
                times[label].append(turn(run))
    macs = {label: cost(each, images[:1]).macs for label, each in networks.items()}
    return {"network": name, "engine": engine, "batch": batch, "machine": machine(),
            "macs": macs, "seconds": {label: min(each) for label, each in times.items()}}  # fmt: skip


def realised(row: dict, label: str) -> tuple[float, float, float]:
    """MACs left, time left, and the share of what was removed that was saved."""
    macs, seconds = row["macs"], row["seconds"]
    left, taken = macs[label] / macs["original"], seconds[label] / seconds["original"]
    return left, taken, (1 - taken) / (1 - left)


def page(rows: list[dict]) -> str:
    """Markdown."""
    shares = {step: [realised(row, label)[2] for row in rows for label, (_, each) in VARIANTS.items() if each == step]
              for step in (1, 8)}  # fmt: skip
    lines = [
        "# Time saved",
        "",
        "What narrow networks take of the time of the wide one, by `python benchmarks/latency.py`: half or 30 % of "
        "every layer's neurons removed (scope `all`), as they come or with `--round_to 8`. *Realised* is the share of "
        "the MACs removed that is time saved. CPU seconds on one thread, the least of five turns, in which the "
        "networks alternate.",
        "",
        " ".join(_summary(step, shares[step]) for step in (8, 1)),
        "",
        "![Share of the MACs removed that is time saved](latency.png)",
        "",
        "| network | engine | images | ms | ratio | MACs left | time left | realised | multiples of 8: MACs left "
        "| time left | realised |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for ratio in (0.3, 0.5):
            cells = [f"{value:.0%}" for step in ("", ", multiples of 8") for value in realised(row, f"{ratio}{step}")]
            head = [row["network"], row["engine"], str(row["batch"]), f"{1000 * row['seconds']['original']:.3g}"]
            lines.append("| " + " | ".join([*head, str(ratio), *cells]) + " |")
    machines = dict.fromkeys(row["machine"] for row in rows)
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}. What is not listed was not run.", ""])


def _summary(step: int, shares: list[float]) -> str:
    """How many cases realise what was asked for."""
    widths = f"With multiples of {step}" if step > 1 else "With widths as they come"
    return (
        f"{widths} {sum(share >= 0.8 for share in shares)} of {len(shares)} cases realise at least 80 %; the least "
        f"{min(shares):.0%}, the median {sorted(shares)[len(shares) // 2]:.0%}."
    )


def plot(rows: list[dict], path: Path) -> None:
    """The share realised without and with multiples of 8, a line for each case."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    colors = dict(zip(NETWORKS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for row in rows:
        for ratio in (0.3, 0.5):
            ends = [100 * realised(row, f"{ratio}{step}")[2] for step in ("", ", multiples of 8")]
            axes.plot([0, 1], ends, "o-", color=colors[row["network"]], alpha=0.7, label=row["network"])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    axes.axhline(80, color="gray", linewidth=1, linestyle="--")
    axes.set(xticks=[0, 1], xticklabels=["widths as they come", "multiples of 8"], xlim=(-0.3, 1.5),
             ylabel="share of the MACs removed\nthat is time saved (%)")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure what is named or lacking, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS], help="all that lack by default")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--output", type=Path, default=DOCS / "latency.jsonl", help="a line of JSON for each case")
    parser.add_argument("--table", action="store_true", help="only write the page beside the output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    rows = {(row["network"], row["engine"], row["batch"]): row for row in map(json.loads, lines)}
    cases = [
        (name, engine, batch) for engine in args.engine for batch in args.batch for name in args.networks or NETWORKS
    ]
    for case in [] if args.table else cases:
        if args.networks or case not in rows:
            rows[case] = measured(*case)
            args.output.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
            print(json.dumps(rows[case]), flush=True)
    args.output.with_suffix(".md").write_text(page(list(rows.values())))
    plot(list(rows.values()), args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
