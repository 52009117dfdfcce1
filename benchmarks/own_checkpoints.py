"""compress.py on the networks that this project trained: the tables of docs/results.md, a command for each row.

    python benchmarks/own_checkpoints.py                          # those in checkpoints/, hours on 2 cores
    python benchmarks/own_checkpoints.py vgg16_cifar10 --checkpoints DIR     # DIR/vgg16_cifar10.ckpt
    python benchmarks/own_checkpoints.py --table                  # docs/results.md from docs/own_checkpoints.jsonl

Each command is run as it stands, on the full test set, and gives one line of JSON for each of its rows. A run that was
stopped goes on. What has not been run says so.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nm_lightning.cli.sources import CHECKPOINTS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKS = "<!-- benchmarks/own_checkpoints.py -->", "<!-- end -->"
CRITERIA = ("l1-norm", "l2-norm", "l2-GM")
# what a row is called: method, criteria, further flags
COMMANDS = {
    "prune": ("prune", CRITERIA, ""),
    "merge": ("merge", CRITERIA, ""),
    "fold": ("fold", ("l2-norm",), ""),
    "reconstruct": ("reconstruct", ("l2-norm",), ""),
    "reconstruct, synthetic": ("reconstruct", ("l2-norm",), "--calibration synthetic"),
    "refit": ("reconstruct", ("l2-norm",), "--refit 2"),
    "refit, synthetic": ("reconstruct", ("l2-norm",), "--refit 2 --calibration synthetic"),
}
NETWORKS = {  # title, what leaves
    "vgg16_cifar100": ("VGG-16 on CIFAR-100", {"published widths": ""}),
    "resnet20_cifar10": ("ResNet-20 on CIFAR-10", {"0.3": "--ratio 0.3", "0.5": "--ratio 0.5"}),
    "vgg16_cifar10": ("VGG-16 on CIFAR-10", {"published widths": ""}),
    "wide_resnet_40_4_cifar10": ("WideResNet-40-4 on CIFAR-10", {"0.3": "--ratio 0.3", "0.5": "--ratio 0.5"}),
}


def command(network: str, cell: str, label: str) -> list[str]:
    """The flags of compress.py, as a reader would type them."""
    method, criteria, more = COMMANDS[label]
    flags = ["--checkpoint", network, "--method", method, "--criterion", *criteria]
    return [*flags, *shlex.split(NETWORKS[network][1][cell]), *shlex.split(more)]


def machine() -> str:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {name or platform.processor() or platform.machine()}, torch {torch.__version__}"


def run(network: str, cell: str, label: str, folder: Path, data_dir: Path) -> list[dict]:
    """A command's rows; the original is one of them."""
    flags = command(network, cell, label)
    file = network if (CHECKPOINTS / f"{network}.ckpt").is_file() else str(folder / f"{network}.ckpt")
    with tempfile.TemporaryDirectory() as output:
        words = [sys.executable, "compress.py", *(file if word == network else word for word in flags)]
        words += ["--data_dir", str(data_dir.resolve()), "--json", "--output", f"{output}/out"]
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | {"WANDB_MODE": "disabled"}, stdout=subprocess.PIPE, text=True, check=True
        )
    report = json.loads(done.stdout)
    about = {"network": network, "cell": cell, "machine": machine()}
    first = about | {"label": "original", "criterion": "", "command": "", "seconds": 0.0}
    rows = [first | {name: report["baseline"][name] for name in ("accuracy", "parameters", "macs")}]
    about |= {"label": label, "command": shlex.join(["python", "compress.py", *flags])}
    for row in report["results"]:
        names = ("criterion", "accuracy", "parameters", "macs", "seconds")
        rows.append(about | {name: row[name] for name in names})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a table for each network."""
    found = {(row["network"], row["cell"], row["label"], row["criterion"]): row for row in rows}
    parts = []
    for network, (title, cells) in NETWORKS.items():
        original = next((row for row in rows if row["network"] == network and row["label"] == "original"), None)
        if original is None:
            parts.append(f"### {title}\n\nNot run.")
            continue
        inside = "" if (CHECKPOINTS / f"{network}.ckpt").is_file() else "; its weights are not in the repository"
        lines = [
            f"### {title}: {100 * original['accuracy']:.2f} %, {original['parameters'] / 1e6:.2f} M parameters, "
            f"{original['macs'] / 1e6:.1f} M MACs",
            "",
            f"Trained by `configs/{network}_fast.yaml`{inside}. `C` is `python compress.py --checkpoint {network}`.",
            "",
            "| ratio | method | criterion | accuracy % | parameters | MACs | seconds | command |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        ]
        for cell in cells:
            for label, (_, criteria, _) in COMMANDS.items():
                words = shlex.join(command(network, cell, label)[2:])
                for criterion in criteria:
                    row = found.get((network, cell, label, criterion))
                    shown = "not run | | | "
                    if row is not None:
                        share = [row[name] / original[name] for name in ("parameters", "macs")]
                        shown = f"{100 * row['accuracy']:.2f} | {share[0]:.0%} | {share[1]:.0%} | {row['seconds']:.1f}"
                    what = f"{cell} | {label} | {criterion}"
                    lines.append(f"| {what} | {shown} | `C {words}` |")
        parts.append("\n".join(lines))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return "\n\n".join([*parts, f"Machine: {machines}, beside other work. Seconds: of the compression alone."])


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["vgg16_cifar100", "resnet20_cifar10"], help=", ".join(NETWORKS))
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of those not in the repository")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    parser.add_argument("--methods", nargs="+", default=list(COMMANDS), help="some of the rows")
    parser.add_argument("--output", type=Path, default=DOCS / "own_checkpoints.jsonl", help="a line of JSON a row")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md", help="where the tables go, between two marks")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    args = parser.parse_args()
    read = args.output.read_text().splitlines() if args.output.is_file() else []
    rows = [json.loads(line) for line in read]
    done = {(row["network"], row["cell"], row["label"]) for row in rows}
    for network in [] if args.table else args.networks:
        for label in args.methods:
            for cell in NETWORKS[network][1]:
                if (network, cell, label) in done:
                    continue
                for row in run(network, cell, label, args.checkpoints, args.data_dir):
                    if (network, cell, row["label"]) not in done or row["label"] != "original":
                        rows.append(row)
                        print(json.dumps(row), flush=True)
                        with args.output.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                done |= {(network, cell, "original"), (network, cell, label)}
    before, _, rest = args.page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    args.page.write_text(f"{before}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
