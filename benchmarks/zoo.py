"""Every classifier of torchvision (or timm), compressed at ratio 0.5 in both scopes, next to torch-pruning.

    python benchmarks/zoo.py                              # all of torchvision; appends to docs/zoo.jsonl
    python benchmarks/zoo.py resnet18 timm/resmlp_12_224  # some
    python benchmarks/zoo.py --table                      # docs/zoo.md from docs/zoo.jsonl

Each network has random weights and is examined in a process of its own. Checked for each scope: the narrow network
runs, parameters and MACs fall, ratio 0 gives the same outputs, pruning equals masking (where no normalisation mixes
channels), a saved network loads onto the wide one, and with `--export` both exports agree with it to 1e-4 of the
outputs' scale. torch-pruning removes half of every layer but the last, by its own magnitude importance.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the oracle that it shares with the tests

from nm_lightning import compress, export, load, save, trace
from nm_lightning.compression import cost
from nm_lightning.compression.structure.copies import without_data
from nm_lightning.compression.structure.operations import MIXING_NORMS
from tests.oracles import masked

SCOPES = ("hidden", "all")
MINUTES, MEMORY = 20, 16 << 30  # for one part of one network
T = TypeVar("T")
DOCS = Path(__file__).parent.parent / "docs"


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and BatchNorm statistics that are not trivial, and one image for it."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"))
        size = model.default_cfg["input_size"][-1]
    else:
        import torchvision

        model = torchvision.models.get_model(name)
        size = 299 if name == "inception_v3" else 224
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(2, 3, size, size)


def examine(model: nn.Module, images: Tensor, scope: str, exports: bool = False) -> dict:
    """Compress at 0.5 and check all that is promised; what was measured."""
    before = cost(without_data(model), images.to("meta"))
    found = trace(model, images, scope)
    seconds, result = timed(lambda: compress(model, images, "prune", ratio=0.5, scope=scope))
    after = cost(without_data(result.model), images.to("meta"))
    with torch.no_grad():
        outputs = result.model(images)
        wide = model(images)
        assert outputs.shape == wide.shape and outputs.isfinite().all()
        assert after.parameters < before.parameters and after.macs < before.macs, "nothing to shrink in this scope"
        assert torch.equal(compress(model, images, ratio=0, scope=scope).model(images), wide), "ratio 0 changes outputs"
        layers = dict(model.named_modules())
        mixing = any(
            isinstance(layers.get(member.name), MIXING_NORMS) for site in found.sites for member in site.passed
        )
        if not mixing:
            silenced = masked(model, result, found.sites)(images)
            assert close(outputs, silenced, 1e-5), "pruning differs from masking"
            del silenced
        with tempfile.TemporaryDirectory() as folder:
            save(result, f"{folder}/small.pt")
            loaded = load(f"{folder}/small.pt", into=copy.deepcopy(model))
            assert torch.equal(loaded(images), outputs), "a loaded network differs"
            if exports:
                program = torch.export.load(export(result.model, images, f"{folder}/small.pt2")).module()
                assert close(program(images), outputs, 1e-4), "pt2 differs"
                import onnxruntime

                session = onnxruntime.InferenceSession(export(result.model, images, f"{folder}/small.onnx"))
                (label,) = (entry.name for entry in session.get_inputs())
                onnx = torch.from_numpy(session.run(None, {label: images.numpy()})[0])
                assert close(onnx, outputs, 1e-4), "ONNX differs"
    return {
        "sites": len(found.sites),
        "left_alone": len(found.skipped),
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "seconds": round(seconds, 3),
        "masked": not mixing,
        "exports": exports,
    }


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """The seconds of the faster of two runs, so that neither side pays for imports, and what the second returned."""
    start = time.perf_counter()
    work()
    middle = time.perf_counter()
    result = work()
    return min(middle - start, time.perf_counter() - middle), result


def close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two outputs agree, relative to the largest."""
    return bool((first - second).abs().max() <= tolerance * second.abs().max())


def logits(outputs: object) -> Tensor:
    """The tensor, or the classes' part of what transformers returns."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def torch_pruning(model: nn.Module, images: Tensor, timer: Callable = timed) -> dict:
    """The same cut by torch-pruning; `timer` runs it and returns the seconds and the network."""
    import torch_pruning as tp

    before = cost(without_data(model), images.to("meta"))
    classes = logits(model(images[:1])).shape[1]
    heads = [m for m in model.modules() if classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]

    def pruned() -> nn.Module:
        narrow = copy.deepcopy(model)  # ours leaves the network as it was too
        ignored = [layer for layer, wide in zip(narrow.modules(), model.modules(), strict=True) if wide in heads]
        importance = tp.importance.MagnitudeImportance(p=2)
        pruner = tp.pruner.MagnitudePruner(narrow, images[:1], importance, pruning_ratio=0.5, ignored_layers=ignored)
        pruner.step()
        return narrow

    seconds, model = timer(pruned)
    with torch.no_grad():
        assert logits(model(images)).shape[1] == classes
    after = cost(without_data(model), images.to("meta"))
    assert after.parameters < before.parameters
    return {
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "seconds": round(seconds, 3),
    }


def part(name: str, label: str, exports: bool) -> dict:
    """What one scope, or torch-pruning, measured on one network; a failure is a sentence."""
    warnings.filterwarnings("ignore")
    try:
        if label == "torch_pruning":
            return torch_pruning(*build(name))
        return examine(*build(name), label, exports)
    except Exception as error:  # the table tells what failed
        lines = str(error).splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:200]}"}


def in_a_process(name: str, label: str, exports: bool) -> dict:
    """The same in a process of its own, which may run out of memory or time."""
    command = [sys.executable, __file__, name, "--part", label, *(["--export"] if exports else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES * 60, preexec_fn=limit_memory)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {MINUTES} minutes"}
    last = (done.stdout.splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else {"failed": f"exit code {done.returncode}"}


def limit_memory() -> None:
    """Fail alone."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def table(rows: list[dict]) -> str:
    """Markdown."""

    def cells(measured: dict) -> list[str]:
        if "failed" in measured:
            return ["failed", "", ""]
        left = [after / before for before, after in (measured["parameters"], measured["macs"])]
        return [f"{left[0]:.0%}", f"{left[1]:.0%}", f"{measured['seconds']:.1f}"]

    lines = [
        "| network | parameters | hidden: sites | parameters left | MACs left | s "
        "| all: sites | parameters left | MACs left | s | torch-pruning: parameters left | MACs left | s |",
        "| --- |" + " ---: |" * 12,
    ]
    for entry in rows:
        parts = [entry[scope] for scope in SCOPES]
        total = next((piece["parameters"][0] for piece in parts if "failed" not in piece), 0)
        line = [entry["name"], f"{total / 1e6:.1f} M"]
        for piece in parts:
            line += [str(piece.get("sites", "")), *cells(piece)]
        lines.append("| " + " | ".join(line + cells(entry["torch_pruning"])) + " |")
    ours, theirs = ([entry for entry in rows if "failed" not in entry[label]] for label in ("all", "torch_pruning"))
    both = [entry for entry in ours if entry in theirs]
    removed = sum(entry["all"]["macs"][1] <= entry["torch_pruning"]["macs"][1] for entry in both)
    ratios = sorted(entry["torch_pruning"]["seconds"] / entry["all"]["seconds"] for entry in both)
    summary = f"{len(ours)} of {len(rows)} networks in scope `all`, {len(theirs)} by torch-pruning."
    if both:
        summary += (
            f" Of the {len(both)} that both handle, ours removes at least as many MACs on {removed}; in the median "
            f"torch-pruning takes {ratios[len(ratios) // 2]:.1f} times as long."
        )
    title = "# The zoo: timm" if rows and rows[0]["name"].startswith("timm/") else "# The zoo"
    return "\n".join([title, "", summary, "", *lines]) + "\n"


def main() -> None:
    """Examine the networks that are named, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="torchvision's names, or timm/<name>; all of torchvision's by default")
    parser.add_argument("--export", action="store_true", help="check both exports too (slow)")
    parser.add_argument("--output", type=Path, default=DOCS / "zoo.jsonl", help="a line of JSON for each network")
    parser.add_argument("--table", action="store_true", help="write zoo.md beside the output")
    parser.add_argument("--part", choices=(*SCOPES, "torch_pruning"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(args.names[0], args.part, args.export)))
        return
    rows = {}
    if args.output.is_file():
        rows = {entry["name"]: entry for entry in map(json.loads, args.output.read_text().splitlines())}
    if not args.table:
        import torchvision

        for name in args.names or torchvision.models.list_models(module=torchvision.models):
            if name in rows and not args.names:
                continue  # a run that was stopped goes on
            entry = {"name": name}
            entry |= {label: in_a_process(name, label, args.export) for label in (*SCOPES, "torch_pruning")}
            rows[name] = entry
            args.output.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
            print(json.dumps(entry), flush=True)
    args.output.with_suffix(".md").write_text(table([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
