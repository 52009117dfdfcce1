"""compress.py on the networks that this project trained: the tables of docs/results.md, a command for each row.

    python benchmarks/own_checkpoints.py                          # those in checkpoints/, hours on 2 cores
    python benchmarks/own_checkpoints.py alexnet_cifar100 --checkpoints DIR  # DIR/alexnet_cifar100.ckpt
    python benchmarks/own_checkpoints.py --table                  # docs/results.md from docs/own_checkpoints.jsonl

Each command is run as it stands, on the full test set, and gives one line of JSON for each of its rows. A run that was
stopped goes on. What has not been run says so.
"""

import argparse
import itertools
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
# methods, criteria, further flags, what those make of a method's name
COMMANDS = (
    (("prune", "merge"), CRITERIA, "", "{}"),
    (("fold", "reconstruct"), ("l2-norm",), "", "{}"),
    (("reconstruct",), ("l2-norm",), "--calibration synthetic", "{}, synthetic"),
    (("reconstruct",), ("l2-norm",), "--refit 2", "refit"),
    (("reconstruct",), ("l2-norm",), "--refit 2 --calibration synthetic", "refit, synthetic"),
)
NETWORKS = {  # title, what leaves
    "vgg16_cifar100": ("VGG-16 on CIFAR-100", {"published widths": ""}),
    "resnet20_cifar10": ("ResNet-20 on CIFAR-10", {"0.3": "--ratio 0.3", "0.5": "--ratio 0.5"}),
    "alexnet_cifar100": (
        "AlexNet on CIFAR-100, its two hidden Linears",
        {f"{ratio}": f"--ratio {ratio}" for ratio in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
    ),
}


def flags_of(network: str, cell: str, number: int) -> list[str]:
    """The flags of compress.py, as a reader would type them."""
    methods, criteria, more, _ = COMMANDS[number]
    flags = ["--checkpoint", network, "--method", *methods, "--criterion", *criteria]
    return [*flags, *shlex.split(NETWORKS[network][1][cell]), *shlex.split(more)]


def labels_of(number: int) -> list[str]:
    """What the rows of a command are called."""
    methods, _, _, label = COMMANDS[number]
    return [label.format(method) for method in methods]


def machine() -> str:
    """What it ran on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores of {name or platform.processor() or platform.machine()}, torch {torch.__version__}"


def run(network: str, cell: str, number: int, folder: Path, data_dir: Path) -> list[dict]:
    """A command's rows; the original is one of them."""
    flags = flags_of(network, cell, number)
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
    about |= {"command": shlex.join(["python", "compress.py", *flags])}
    for row in report["results"]:
        names = ("criterion", "accuracy", "parameters", "macs", "seconds")
        label = COMMANDS[number][3].format(row["method"])
        rows.append({**about, "label": label} | {name: row[name] for name in names})
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
        for cell, (number, each) in itertools.product(cells, enumerate(COMMANDS)):
            for label, criterion in itertools.product(labels_of(number), each[1]):
                row = found.get((network, cell, label, criterion))
                words, shown = shlex.join(flags_of(network, cell, number)[2:]), "not run | | | "
                if row is not None:
                    share = [row[name] / original[name] for name in ("parameters", "macs")]
                    shown = f"{100 * row['accuracy']:.2f} | {share[0]:.0%} | {share[1]:.0%} | {row['seconds']:.1f}"
                    words = row["command"].partition(f"{network} ")[2]
                lines.append(f"| {cell} | {label} | {criterion} | {shown} | `C {words}` |")
        parts.append("\n".join(lines))
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    return "\n\n".join([*parts, f"Machine: {machines}, beside other work. Seconds: of the compression alone."])


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["vgg16_cifar100", "resnet20_cifar10"], help=", ".join(NETWORKS))
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of those not in the repository")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the images are")
    every = list(range(len(COMMANDS)))
    parser.add_argument("--commands", nargs="+", type=int, choices=every, default=every, help="some of them, by number")
    parser.add_argument("--output", type=Path, default=DOCS / "own_checkpoints.jsonl", help="a line of JSON a row")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md", help="where the tables go, between two marks")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    args = parser.parse_args()
    read = args.output.read_text().splitlines() if args.output.is_file() else []
    rows = [json.loads(line) for line in read]
    for network in [] if args.table else args.networks:
        for number, cell in itertools.product(args.commands, NETWORKS[network][1]):
            done = {(row["network"], row["cell"], row["label"]) for row in rows}
            if all((network, cell, label) in done for label in labels_of(number)):
                continue
            for row in run(network, cell, number, args.checkpoints, args.data_dir):
                if (network, cell, row["label"]) not in done:
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    before, _, rest = args.page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    args.page.write_text(f"{before}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
