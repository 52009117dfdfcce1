"""The figures of method.md; run as `python docs/figures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import nn

from nm_lightning import compress

HERE = Path(__file__).parent
RED, BLUE, GREEN, GREY = "#c8503c", "#2f6fb4", "#2e8b57", "#8a8f95"


def merging() -> None:
    """Three neurons of two inputs: the removed one's direction, and what it becomes in the next layer."""
    figure, (space, columns) = plt.subplots(1, 2, figsize=(9, 3.6), dpi=130, layout="constrained")
    arrows = {"kept 1": (0.3, 1.0, BLUE), "kept 2": (1.0, 0.25, GREEN), "removed": (0.55, 0.18, RED)}
    for name, (x, y, colour) in arrows.items():
        space.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})
        space.text(x + 0.03, y + 0.02, name, color=colour)
    space.plot([0.0, 1.0], [0.0, 0.25], color=GREEN, ls=":", lw=1)
    space.set(xlim=(0, 1.3), ylim=(0, 1.15), xlabel="weight of input 1", ylabel="weight of input 2")
    space.set_title("the removed neuron points like kept 2, half as long", fontsize=10)
    tall = {"kept 1": BLUE, "kept 2": GREEN, "removed": RED}
    for place, (name, colour) in enumerate(tall.items()):
        columns.add_patch(plt.Rectangle((1.3 * place, 0), 0.7, 3, color=colour, alpha=0.85))
        columns.text(1.3 * place + 0.35, 3.15, name, ha="center", fontsize=9)
    columns.annotate("", (5.0, 1.5), (3.8, 1.5), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 2})
    for place, (name, colour) in enumerate((("kept 1", BLUE), ("kept 2 + ½ removed", GREEN))):
        columns.add_patch(plt.Rectangle((5.4 + 2 * place, 0), 0.7, 3, color=colour, alpha=0.85))
        columns.text(5.75 + 2.2 * place, 3.15, name, ha="center", fontsize=9)
    columns.add_patch(plt.Rectangle((8.1, 0), 0.35, 3, color=RED, alpha=0.85))
    columns.set(xlim=(-0.4, 9.4), ylim=(-0.2, 3.6))
    columns.set_title("so the next layer adds half of its column to kept 2's", fontsize=10)
    columns.axis("off")
    figure.savefig(HERE / "method_merging.png")


def methods() -> None:
    """A random layer of 200 neurons on inputs of 40 dimensions: the next layer's error under each method."""
    torch.manual_seed(0)
    basis = torch.randn(40, 200) / 40**0.5
    net = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    net[0].weight.data = basis.T @ torch.diag(torch.linspace(1.5, 0.1, 40)) * 2
    images = torch.randn(4096, 40) @ torch.diag(torch.linspace(2, 0.05, 40))
    seen, unseen = images.split(2048)
    ratios = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=130, layout="constrained")
    with torch.no_grad():
        wanted = net(unseen)
        for method, colour in (("prune", RED), ("merge", BLUE), ("reconstruct", GREEN)):
            errors = []
            for ratio in ratios:
                narrow = compress(net, seen[:1], method, ratio=ratio, calibration=seen, calibration_size=2048).model
                errors.append(float((narrow(unseen) - wanted).square().sum() / wanted.square().sum()))
            axes.semilogy(ratios, errors, color=colour, marker="o", ms=4, label=method)
    axes.set(xlabel="share of neurons removed", ylabel="error of the next layer, share of its energy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "method_error.png")


if __name__ == "__main__":
    merging()
    methods()
