"""Make a trained network smaller without retraining: prune, merge or reconstruct its neurons, measure, and save.

python compress.py --method merge --ratio 0.5
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from rich import get_console

from nm_lightning.cli.errors import OneLineParser, fail, one_line_errors
from nm_lightning.cli.grid import Grid, run_grid
from nm_lightning.cli.launch import fabric_of
from nm_lightning.cli.sources import RUNS, open_source
from nm_lightning.cli.sweeps import flags_of
from nm_lightning.reporting.weights_and_biases import log_invocation


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `None` where the network's preset decides."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", nargs="+", default=["merge"], help="prune, merge, fold, reconstruct (one or several)"
    )
    parser.add_argument("--criterion", nargs="+", default=["l2-norm"], help="l1-norm, l2-norm, l2-GM, output")
    parser.add_argument("--ratio", nargs="+", type=float, help="share of neurons to remove, one or several (0.5)")
    parser.add_argument("--widths", nargs="+", help="survivors: an integer for each site in order, or site=width")
    parser.add_argument(
        "--target_parameters", type=float, help="instead: the share that may stay, cut where it costs least"
    )
    parser.add_argument("--target_macs", type=float, help="likewise of the multiply-accumulates")
    parser.add_argument("--sites", nargs="+", help="glob patterns of layer names (all hidden layers)")
    parser.add_argument("--scope", default="hidden", help="hidden, or all: the neurons of residual streams too")
    parser.add_argument("--threshold", type=float, help="least cosine similarity of a merged pair; 0: no test (0.1)")
    parser.add_argument(
        "--lamda", "--lambda", type=float, help="weight of cosine against bias distance, with BatchNorm (0.85)"
    )
    parser.add_argument("--formulation", default="published", help="published, textbook or consistent")
    parser.add_argument("--implementation", default="fast", help="fast, or reference for the paper's loops")
    parser.add_argument(
        "--calibration",
        default="data",
        help="unlabelled images: data (training images), synthetic, or a folder",
    )
    parser.add_argument("--calibration_size", type=int, default=1024, help="how many, drawn by seed; no labels (1024)")
    parser.add_argument("--reconstruction", default="layer", help="layer, or channel: one map for each site (GRAIL)")
    parser.add_argument("--ridge", type=float, default=1e-3, help="of reconstruct's least squares (0.001)")
    parser.add_argument(
        "--refit", type=int, default=0, help="rounds of least squares for each site's layers together, no labels (0)"
    )
    parser.add_argument(
        "--recalibrate_norm", action="store_true", help="estimate BatchNorm statistics anew on the calibration images"
    )
    parser.add_argument(
        "--finetune", type=int, default=0, help="epochs of training on the original's predictions, no labels (0)"
    )
    parser.add_argument("--checkpoint", help="Lightning checkpoint or state dict (the newest best.ckpt under runs/)")
    parser.add_argument("--model", help="network, where the checkpoint does not say, such as resnet56")
    parser.add_argument("--data", help="digits, fashion_mnist, cifar10, cifar100, imagenet or folder, likewise")
    parser.add_argument("--data_dir", help="where the images are (data)")
    parser.add_argument("--weights", help="torchvision's pretrained weights instead of a checkpoint, such as DEFAULT")
    parser.add_argument("--latency", action="store_true", help="time an image before and after, batches of 1 and 128")
    parser.add_argument("--export", nargs="+", default=[], help="pt2, onnx: each result as a file that runs elsewhere")
    parser.add_argument("--output", type=Path, help="folder for report, plot and checkpoints (a new one under runs/)")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--devices", type=int, default=1, help="processes on each machine, a device for each (1)")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines, each started by torchrun or SLURM (1)")
    parser.add_argument("--strategy", default="auto", help="Lightning's name of it, such as ddp (auto)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print report.json and nothing else")
    parser.add_argument("--wandb_project", default="nm-lightning", help="Weights & Biases project (nm-lightning)")
    parser.add_argument("--wandb_entity", help="team or user there (yours)")
    parser.add_argument("--wandb_tags", nargs="+", default=[], help="tags of the run")
    parser.add_argument("--sweep", type=Path, help="a W&B sweep file: its whole grid here, as one table and one plot")
    args = parser.parse_args(arguments)
    if args.sweep is not None:
        own = sys.argv[1:] if arguments is None else arguments
        args = parser.parse_args([*flags_of(args.sweep), *own])  # a flag given here wins
    return args


def parse_widths(words: list[str] | None) -> list[int] | dict[str, int] | None:
    """`["32", "64"]` to a list, `["conv1=32"]` to a mapping."""
    if words is None:
        return None
    named = ["=" in word for word in words]
    if any(named) != all(named):
        fail(f"--widths {' '.join(words)}: give integers in order, or site=width throughout, not both")
    try:
        if all(named):
            return {site: int(width) for site, _, width in (word.rpartition("=") for word in words)}
        return [int(word) for word in words]
    except ValueError:
        fail(f"--widths {' '.join(words)}: give whole numbers")


def main(arguments: list[str] | None = None) -> None:
    """Run the grid that the flags describe."""
    with one_line_errors():
        args = parse(arguments)
        fabric = fabric_of(args.device, args.devices, args.num_nodes, args.strategy)
        torch.manual_seed(args.seed)
        args.widths = parse_widths(args.widths)
        grid = Grid(**{setting.name: getattr(args, setting.name) for setting in fields(Grid)})
        source = open_source(args.checkpoint, args.model, args.data, args.data_dir, args.weights, args.seed)
        label = source.module.hparams.name.replace("/", "_")
        output = args.output or RUNS / f"compress-{label}-{time.strftime('%Y%m%d-%H%M%S')}"
        get_console().quiet = args.quiet or args.json
        report = run_grid(source, grid, output, fabric, shlex.join(["python", *sys.argv]))
        if fabric.is_global_zero:
            where = args.wandb_project, args.wandb_entity, args.wandb_tags
            line = log_invocation(report, vars(args), output, source.path, *where)
            if line:
                get_console().print(line, soft_wrap=True)
            if args.json:
                print(json.dumps(report))


if __name__ == "__main__":
    main()
