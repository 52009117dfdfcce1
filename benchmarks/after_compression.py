"""What some epochs of training give back after a compression, with labels and without.

    python benchmarks/after_compression.py                  # all cells, hours on 2 cores; docs/after_compression.jsonl
    python benchmarks/after_compression.py --networks resnet20_30_epochs_cifar10 --epochs 0 1 --ratios 0.5
    python benchmarks/after_compression.py --table          # docs/after_compression.md and .png from the rows

The networks of checkpoints/ without so many of each layer's neurons that about 50 and 30 % of the MACs are left begin
from each method's weights, or from random ones at the same widths. With labels they are trained as
configs/finetune.yaml says (from random weights as the network's own fast config), without as `--finetune_on training`
does, each number of epochs a training of its own; with labels in bfloat16, on 98 % of the training images. A run that
was stopped goes on; what takes fewest epochs comes first.
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

from nm_lightning import compress, load, save
from nm_lightning.cli.sources import Asked, open_source
from nm_lightning.compression import cost
from nm_lightning.compression.refine.distill import RATES, distill
from nm_lightning.data import TrainingImages
from nm_lightning.measure import evaluate
from nm_lightning.modules import ImageClassifier

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RULE = """
What follows from it: `--refit 2` without any training is worth one to two epochs of training after pruning. Whoever
trains for some epochs, with labels or without, ends within half a point wherever it began, but not from random weights,
which ten epochs bring nowhere near. Learning from the original's predictions does as well as learning from labels; at a
third of the MACs labels win after five epochs. A refitted VGG-16 loses at first at this rate.
"""
STARTED = ROOT / "runs" / "after_compression"  # the compressed networks, kept from one call to the next
NETWORKS = {  # title, accuracy of the original in %, ratios
    "resnet20_30_epochs_cifar10": ("ResNet-20, CIFAR-10", 89.91, (0.5, 0.7)),
    "vgg16_cifar100": ("VGG-16, CIFAR-100", 71.75, (0.29, 0.45)),
}
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
    """A trained network, its images, and what is made of it."""

    def __init__(self, network: str, data_dir: Path):
        loaders = open_source(Asked(network, data_dir=str(data_dir))).loaders
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network, self.module, self.data = network, loaders.module.to(self.device), loaders.data
        self.data.setup("fit")
        self.original = cost(self.module.model, self.module.example_input)

    def start(self, ratio: float, start: str) -> nn.Module:
        """The narrow network before any training."""
        file = STARTED / f"{self.network}_{start}_{ratio}.pt"
        if not file.is_file():
            torch.manual_seed(0)
            images = self.data.calibration_images("data", 1024).to(self.device)
            settings = {"ratio": ratio, "calibration": images, **STARTS[start]}
            result = compress(self.module.model, self.module.example_input, **settings)
            for part in result.model.modules() if start == "random" else ():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
            file.parent.mkdir(parents=True, exist_ok=True)
            save(result, file)
        return load(file, into=copy.deepcopy(self.module.model))

    def run(self, ratio: float, start: str, how: str, epochs: int) -> dict:
        """Train and measure."""
        config = f"{self.network.replace('30_epochs_', '')}_fast" if start == "random" else "finetune"
        config = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
        seed_everything(0, verbose=False)
        own = {name: value for name, value in config["model"].items() if name not in ("name", "label_smoothing")}
        module = ImageClassifier(**{**self.module.hparams, "label_smoothing": 0.0, **own})
        module.model = self.start(ratio, start).to(memory_format=torch.channels_last)
        self.data.hparams.update(config["data"])
        begin = time.perf_counter()
        if epochs and how == "labels":
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = Trainer(
                max_epochs=epochs, precision="bf16-mixed", limit_val_batches=0, enable_model_summary=False, **quiet
            )
            trainer.fit(module, self.data)
        elif epochs:
            original = self.module.model.to(memory_format=torch.channels_last).eval()
            images = TrainingImages(self.data, self.device)
            module.model.to(self.device)
            distill(module.model, original, images, epochs, 0, rate=RATES["training"], norms=True)
        seconds = time.perf_counter() - begin
        narrow = module.model.to(self.device).float()
        size = cost(narrow, self.module.example_input)
        return {
            "network": self.network,
            "ratio": ratio,
            "macs": round(size.macs / self.original.macs, 3),
            "start": start,
            "how": how,
            "epochs": epochs,
            "accuracy": evaluate(narrow, self.data.test_dataloader(), self.data),
            "seconds": round(seconds, 1),
            "machine": machine(),
        }


def key(row: dict) -> tuple:
    """Which cell a row is."""
    return tuple(row[name] for name in ("network", "ratio", "start", "how", "epochs"))


def cells(networks: list[str], ratios: list[float] | None, how: list[str], epochs: list[int]) -> list[tuple]:
    """What there is to run; without training there are no two ways."""
    return [
        (network, ratio, start, way, count)
        for count, network in itertools.product(sorted(epochs), networks)
        for ratio, way, start in itertools.product(ratios or NETWORKS[network][2], how, STARTS)
        if count or way == HOW[0]
    ]


def page(rows: list[dict]) -> str:
    """Markdown: a table for each network and ratio."""
    found = {key(row): row for row in rows}
    parts = [f"# After compression\n\n{__doc__.partition(chr(10) * 2)[2].partition(chr(10) * 2)[2].strip()}"]
    parts += [RULE.strip(), "Accuracy in % on the full test set.", "![A line a start](after_compression.png)"]
    for network, (title, accuracy, ratios) in NETWORKS.items():
        for ratio in ratios:
            macs = next((row["macs"] for row in rows if key(row)[:2] == (network, ratio)), None)
            left = "" if macs is None else f", {macs:.0%} of the MACs"
            heads = " | ".join(f"{count} epochs" for count in EPOCHS)
            lines = [f"## {title} ({accuracy}): ratio {ratio}{left}", "", f"| start | trained with | {heads} |"]
            lines.append("| --- | --- |" + " ---: |" * len(EPOCHS))
            for start, how in itertools.product(STARTS, HOW):
                shown = []
                for count in EPOCHS:
                    row = found.get((network, ratio, start, how if count else HOW[0], count))
                    shown.append("not run" if row is None else f"{100 * row['accuracy']:.2f}")
                lines.append(f"| {start} | {how} | " + " | ".join(shown) + " |")
            parts.append("\n".join(lines))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    total = sum(row["seconds"] for row in rows) / 3600
    parts.append(f"Machine: {machines}, beside other work; {total:.1f} hours in all. One seed each.")
    return "\n\n".join(parts) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over epochs, a panel for each network and ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(len(NETWORKS), 2, figsize=(11, 4 * len(NETWORKS)), dpi=130, layout="constrained")
    for line, (network, (title, accuracy, ratios)) in zip(panels, NETWORKS.items(), strict=True):
        for axes, ratio in zip(line, ratios, strict=True):
            own = [row for row in rows if key(row)[:2] == (network, ratio)]
            for (number, start), (how, style) in itertools.product(
                enumerate(STARTS), zip(HOW, ("-", "--"), strict=True)
            ):
                points = sorted(
                    (EPOCHS.index(row["epochs"]), 100 * row["accuracy"])
                    for row in own
                    if row["start"] == start and (row["how"] == how or not row["epochs"])
                )
                if len(points) > 1:
                    label = f"{start}, {how}"
                    axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=f"C{number}", label=label)
            axes.axhline(accuracy, color="0.5", linewidth=1)
            macs = next((row["macs"] for row in own), 1 - ratio)
            axes.set(xlabel="epochs of training", title=f"{title}, {macs:.0%} of the MACs")
            axes.set(xticks=range(len(EPOCHS)), xticklabels=EPOCHS, ylim=(accuracy - 25, accuracy + 2))
            if not own:
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("test accuracy (%)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Run what is missing, then write page and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="some of them")
    parser.add_argument("--ratios", nargs="+", type=float, help="some of them")
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS), help="some of them")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="some of them")
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW), help="some of them")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    parser.add_argument("--output", type=Path, default=DOCS / "after_compression.jsonl", help="a line of JSON a row")
    parser.add_argument("--table", action="store_true", help="only write page and plot")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    done = {key(row) for row in rows}
    wanted = [] if args.table else cells(args.networks, args.ratios, args.how, args.epochs)
    benches: dict[str, Bench] = {}
    for cell in wanted:
        network, ratio, start, how, epochs = cell
        if cell in done or start not in args.starts:
            continue
        if network not in benches:
            benches[network] = Bench(network, args.data_dir)
        rows.append(benches[network].run(ratio, start, how, epochs))
        print(json.dumps(rows[-1]), flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    args.output.with_suffix(".md").write_text(page(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
