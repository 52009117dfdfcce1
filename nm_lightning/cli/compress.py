"""Make a trained network smaller without retraining: prune, merge or reconstruct its neurons, measure, and save.

python compress.py --method merge --ratio 0.5
"""

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path

from nm_lightning.cli import flags
from nm_lightning.cli.errors import OneLineParser, one_line_errors
from nm_lightning.cli.sweeps import flags_of

RUNS = Path("runs")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; `None` where the network's preset or a setting's default decides."""
    parser = parser_of_flags()
    own = sys.argv[1:] if arguments is None else arguments
    args, rest = parser.parse_known_args(own)
    if args.sweep is not None:
        args, rest = parser.parse_known_args([*flags_of(args.sweep), *own])  # a flag given here wins
    args.arguments = flags.dotted(rest, ("model", "data"))
    return args


def parser_of_flags() -> argparse.ArgumentParser:
    """All flags with their help."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods, criteria = (", ".join(flags.known()[kind]) for kind in ("method", "criterion"))
    parser.add_argument("--method", nargs="+", default=["merge"], help=f"{methods}; one or several (merge)")
    parser.add_argument("--criterion", nargs="+", default=["auto"], help=f"{criteria}; one or several (auto)")
    flags.add_settings(parser)
    parser.add_argument(
        "--calibration", default="data", help="unlabelled images: data (training images), synthetic, or a folder (data)"
    )
    parser.add_argument("--checkpoint", help="file, or a name in checkpoints/ (the newest best.ckpt under runs/)")
    parser.add_argument(
        "--model", help="network, if the checkpoint does not say: resnet56, ..., or your package.module:Class"
    )
    parser.add_argument("--data", help="digits, fashion_mnist, cifar10, cifar100, imagenet, folder or module:Class")
    parser.add_argument("--data_dir", help="where the images are (data)")
    parser.add_argument("--weights", help="torchvision's pretrained weights instead of a checkpoint, such as DEFAULT")
    parser.add_argument("--input_key", help="of the images in a batch: a name or a place (image, x, ..., or the first)")
    parser.add_argument("--label_key", help="of the labels, likewise (label, y, ..., or the second)")
    parser.add_argument(
        "--analyse",
        nargs="?",
        type=int,
        const=1024,
        metavar="IMAGES",
        help="compress nothing: what each site holds, and what a tenth, three tenths and half of it (or --ratio) cost "
        "alone, on so many test images (1024)",
    )
    parser.add_argument("--latency", action="store_true", help="time an image before and after, batches of 1 and 128")
    parser.add_argument("--export", nargs="+", default=[], help="pt2, onnx: each result as a file that runs elsewhere")
    parser.add_argument(
        "--quantize", help="int8: each result as an ONNX file, and as one in 8 bits, both measured by onnxruntime"
    )
    parser.add_argument("--output", type=Path, help="folder for report, plot and checkpoints (a new one under runs/)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
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


def command_line() -> str:
    """What repeats this call."""
    script, *arguments = sys.argv
    return shlex.join([*(["python", script] if script.endswith(".py") else [Path(script).name]), *arguments])


def main(arguments: list[str] | None = None) -> None:
    """Run the grid that the flags describe."""
    with one_line_errors():
        run(parse(arguments))


def run(args: argparse.Namespace) -> None:
    """What was asked for; nothing heavy is imported before the flags are read."""
    given = flags.given_settings(args)

    import torch
    from rich import get_console

    from nm_lightning.cli.analyse import run_analysis
    from nm_lightning.cli.grid import Grid, run_grid
    from nm_lightning.cli.launch import fabric_of
    from nm_lightning.cli.sources import Asked, open_source
    from nm_lightning.own_code import find_here
    from nm_lightning.reporting.weights_and_biases import log_invocation

    find_here()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    fabric = fabric_of(args.device, args.devices, args.num_nodes, args.strategy)
    seed = args.seed or 0
    torch.manual_seed(seed)
    ratios = given.pop("ratio", None)
    words = flags.source_words(args, parser_of_flags())
    files = {"export": args.export, "quantize": args.quantize}
    grid = Grid(args.method, args.criterion, ratios, given, args.calibration, args.latency, source=words, **files)
    keys = tuple(int(key) if key and key.lstrip("-").isdigit() else key for key in (args.input_key, args.label_key))
    weights = {"weights": args.weights, "seed": seed, "arguments": args.arguments, "keys": keys}
    source = open_source(Asked(args.checkpoint, args.model, args.data, args.data_dir, **weights))
    label = re.sub(r"[^\w.-]+", "_", source.name)
    kind = "compress" if args.analyse is None else "analyse"
    output = args.output or RUNS / f"{kind}-{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    get_console().quiet = args.quiet or args.json
    if args.analyse is not None:
        report = run_analysis(source, grid, output, fabric, args.analyse, command_line())
    else:
        report = run_grid(source, grid, output, fabric, command_line())
    if fabric.is_global_zero:
        where = args.wandb_project, args.wandb_entity, args.wandb_tags
        line = log_invocation(report, vars(args), output, source.path, *where) if args.analyse is None else ""
        if line:
            get_console().print(line, soft_wrap=True)
        if args.json:
            print(json.dumps(report))
