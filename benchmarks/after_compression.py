"""What some epochs of training give back after a compression, with labels and without.

    python benchmarks/after_compression.py                  # all cells, hours on 2 cores; docs/after_compression.jsonl
    python benchmarks/after_compression.py --epochs 0 1 --ratios 0.5
    python benchmarks/after_compression.py --table          # docs/after_compression.md and .png from the rows

ResNet-20 of checkpoints/ without half and without 70 % of each block's neurons, which leaves about 50 and 30 % of the
MACs, begins from each method's weights, or from random ones at the same widths. With labels it is trained as
configs/finetune.yaml says (from random weights as configs/resnet20_cifar10_fast.yaml), without as `--finetune_on
training` does, each number of epochs a training of its own; with labels in bfloat16, on 98 % of the training images. A
run that was stopped goes on; what takes fewest epochs comes first.
"""

import argparse
import copy
import itertools
import json
import time
import warnings
from pathlib import Path

import torch
import yaml
from own_checkpoints import machine
from pytorch_lightning import Trainer, seed_everything
from torch import nn

from nm_lightning import compress
from nm_lightning.cli.sources import Asked, open_source
from nm_lightning.compression import cost
from nm_lightning.compression.refine.distill import RATES, distill
from nm_lightning.data import TrainingImages
from nm_lightning.measure import evaluate
from nm_lightning.modules import ImageClassifier

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NETWORK = "resnet20_cifar10"
RATIOS = (0.5, 0.7)
STARTS = {  # settings of `compress`
    "prune": {"method": "prune"},
    "merge": {"method": "merge"},
    "reconstruct": {"method": "reconstruct"},
    "refit": {"method": "reconstruct", "refit": 2},
    "random": {"method": "prune"},
}
EPOCHS = (0, 1, 2, 5, 10)
HOW = ("labels", "no labels")


class Bench:
    """The trained network, its images, and what is made of it."""

    def __init__(self, data_dir: Path):
        loaders = open_source(Asked(NETWORK, data_dir=str(data_dir))).loaders
        self.module, self.data = loaders.module, loaders.data
        self.data.setup("fit")
        self.calibration = self.data.calibration_images("data", 1024)
        self.starts: dict[tuple, nn.Module] = {}
        self.original = cost(self.module.model, self.module.example_input)

    def start(self, ratio: float, start: str) -> nn.Module:
        """The narrow network before any training."""
        if (ratio, start) not in self.starts:
            torch.manual_seed(0)
            settings = {"ratio": ratio, "calibration": self.calibration, **STARTS[start]}
            narrow = compress(self.module.model, self.module.example_input, **settings).model
            for part in narrow.modules() if start == "random" else ():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            self.starts[ratio, start] = narrow
        return self.starts[ratio, start]

    def run(self, ratio: float, start: str, how: str, epochs: int) -> dict:
        """Train and measure."""
        config = "resnet20_cifar10_fast" if start == "random" else "finetune"
        config = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
        seed_everything(0, verbose=False)
        module = ImageClassifier(**{**self.module.hparams, "label_smoothing": 0.0, **config["model"]})
        module.model = copy.deepcopy(self.start(ratio, start)).to(memory_format=torch.channels_last)
        self.data.hparams.update(config["data"])
        begin = time.perf_counter()
        if epochs and how == "labels":
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = Trainer(
                max_epochs=epochs, precision="bf16-mixed", limit_val_batches=0, enable_model_summary=False, **quiet
            )
            trainer.fit(module, self.data)
        elif epochs:
            images = TrainingImages(self.data, module.device)
            distill(module.model, self.module.model.eval(), images, epochs, 0, rate=RATES["training"], norms=True)
        seconds = time.perf_counter() - begin
        narrow = module.model.float()
        size = cost(narrow, self.module.example_input)
        return {
            "ratio": ratio,
            "macs": round(size.macs / self.original.macs, 3),
            "start": start,
            "how": how,
            "epochs": epochs,
            "accuracy": evaluate(narrow, self.data.test_dataloader(), self.data),
            "seconds": round(seconds, 1),
            "machine": machine(),
        }


def cells(ratios: list[float], epochs: list[int]) -> list[tuple]:
    """What there is to run; without training there are no two ways."""
    found = itertools.product(sorted(epochs), ratios, HOW, STARTS)
    return [(ratio, start, how, count) for count, ratio, how, start in found if count or how == HOW[0]]


def page(rows: list[dict]) -> str:
    """Markdown: a table for each ratio."""
    found = {(row["ratio"], row["start"], row["how"], row["epochs"]): row for row in rows}
    parts = [f"# After compression\n\n{__doc__.partition(chr(10) * 2)[2].partition(chr(10) * 2)[2].strip()}"]
    parts += ["Accuracy in % on the full test set; the original has 89.91.", "![A line a start](after_compression.png)"]
    for ratio in RATIOS:
        macs = next((f": {row['macs']:.0%} of the MACs" for row in rows if row["ratio"] == ratio), "")
        heads = " | ".join(f"{count} epochs" for count in EPOCHS)
        lines = [f"## Ratio {ratio}{macs}", "", f"| start | trained with | {heads} |"]
        lines.append("| --- | --- |" + " ---: |" * len(EPOCHS))
        for start, how in itertools.product(STARTS, HOW):
            shown = []
            for count in EPOCHS:
                row = found.get((ratio, start, how if count else HOW[0], count))
                shown.append("not run" if row is None else f"{100 * row['accuracy']:.2f}")
            lines.append(f"| {start} | {how} | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    total = sum(row["seconds"] for row in rows) / 3600
    parts.append(f"Machine: {machines}, beside other work; {total:.1f} hours in all. One seed each.")
    return "\n\n".join(parts) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over epochs, a panel for each ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(RATIOS), figsize=(11, 4.6), dpi=130, layout="constrained", sharey=True)
    for axes, ratio in zip(panels, RATIOS, strict=True):
        for (number, start), (how, style) in itertools.product(enumerate(STARTS), zip(HOW, ("-", "--"), strict=True)):
            own = [row for row in rows if (row["ratio"], row["start"]) == (ratio, start)]
            points = sorted(
                (row["epochs"], 100 * row["accuracy"]) for row in own if row["how"] == how or not row["epochs"]
            )
            if points:
                label = f"{start}, {how}" if len(points) > 1 or how == HOW[0] else None
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=f"C{number}", label=label)
        axes.axhline(89.91, color="0.5", linewidth=1)
        macs = next((row["macs"] for row in rows if row["ratio"] == ratio), 1 - ratio)
        axes.set(xlabel="epochs of training", title=f"ResNet-20, CIFAR-10, {macs:.0%} of the MACs")
        last = max([2, *(row["epochs"] for row in rows)])
        axes.set(xlim=(-0.3, last + 0.3), xticks=[count for count in EPOCHS if count <= last])
        if not any(row["ratio"] == ratio for row in rows):
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Run what is missing, then write page and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="some of them")
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS), help="some of them")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="some of them")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    parser.add_argument("--output", type=Path, default=DOCS / "after_compression.jsonl", help="a line of JSON a row")
    parser.add_argument("--table", action="store_true", help="only write page and plot")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    done = {(row["ratio"], row["start"], row["how"], row["epochs"]) for row in rows}
    left = [] if args.table else [cell for cell in cells(args.ratios, args.epochs) if cell not in done]
    left = [cell for cell in left if cell[1] in args.starts]
    bench = Bench(args.data_dir) if left else None
    for cell in left:
        rows.append(bench.run(*cell))
        print(json.dumps(rows[-1]), flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    args.output.with_suffix(".md").write_text(page(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
