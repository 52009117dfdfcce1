import json

from nm_lightning.cli import compress

GRID = ["--method", "prune", "merge", "reconstruct", "--criterion", "l1-norm", "l2-norm", "--ratio", "0.5", "0.8"]


def run(trained, folder, *flags):
    """compress.py on a checkpoint; what its report.json holds."""
    compress.main(["--checkpoint", str(trained), "--device", "cpu", "--output", str(folder), *flags])
    return json.loads((folder / "report.json").read_text())
