"""Make a trained network smaller without retraining: prune, merge or reconstruct its neurons, measure, and save.

python compress.py --method merge --ratio 0.5
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from rich import get_console

from nm_lightning.cli.errors import OneLineParser, one_line_errors
from nm_lightning.cli.flags import add_settings, given_settings
from nm_lightning.cli.grid import Grid, run_grid
from nm_lightning.cli.launch import fabric_of
from nm_lightning.cli.sources import RUNS, open_source
from nm_lightning.cli.sweeps import flags_of
from nm_lightning.compression import Criterion, Method
from nm_lightning.reporting.weights_and_biases import log_invocation


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `None` where the network's preset or a setting's default decides."""
    parser = parser_of_flags()
    args = parser.parse_args(arguments)
    if args.sweep is not None:
        own = sys.argv[1:] if arguments is None else arguments
        args = parser.parse_args([*flags_of(args.sweep), *own])  # a flag given here wins
    return args


def parser_of_flags() -> argparse.ArgumentParser:
    """All flags with their help."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods, criteria = ", ".join(Method.known), ", ".join(Criterion.known)
    parser.add_argument("--method", nargs="+", default=["merge"], help=f"{methods}; one or several (merge)")
    parser.add_argument("--criterion", nargs="+", default=["l2-norm"], help=f"{criteria}; one or several (l2-norm)")
    add_settings(parser)
    parser.add_argument(
        "--calibration", default="data", help="unlabelled images: data (training images), synthetic, or a folder (data)"
    )
    parser.add_argument("--checkpoint", help="file, or a name in checkpoints/ (the newest best.ckpt under runs/)")
    parser.add_argument("--model", help="network, where the checkpoint does not say, such as resnet56")
    parser.add_argument("--data", help="digits, fashion_mnist, cifar10, cifar100, imagenet or folder, likewise")
    parser.add_argument("--data_dir", help="where the images are (data)")
    parser.add_argument("--weights", help="torchvision's pretrained weights instead of a checkpoint, such as DEFAULT")
    parser.add_argument("--latency", action="store_true", help="time an image before and after, batches of 1 and 128")
    parser.add_argument("--export", nargs="+", default=[], help="pt2, onnx: each result as a file that runs elsewhere")
    parser.add_argument("--output", type=Path, help="folder for report, plot and checkpoints (a new one under runs/)")
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
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the grid that the flags describe."""
    with one_line_errors():
        args = parse(arguments)
        fabric = fabric_of(args.device, args.devices, args.num_nodes, args.strategy)
        given, seed = given_settings(args), args.seed or 0
        torch.manual_seed(seed)
        ratios = given.pop("ratio", None)
        grid = Grid(args.method, args.criterion, ratios, given, args.calibration, args.latency, args.export)
        source = open_source(args.checkpoint, args.model, args.data, args.data_dir, args.weights, seed)
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
