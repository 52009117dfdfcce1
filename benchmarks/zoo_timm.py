"""One network of each of timm's architecture modules, and fifteen image classifiers of transformers, at ratio 0.5.

    python benchmarks/zoo_timm.py              # those that docs/zoo_timm.jsonl lacks; a run that was stopped goes on
    python benchmarks/zoo_timm.py levit gcvit  # these modules again
    python benchmarks/zoo_timm.py --exports    # also writes both exports of those that lack them, the smallest first
    python benchmarks/zoo_timm.py --table      # only docs/zoo_timm.md from the lines

Of timm it is the network with the fewest parameters that can be built (those named `test_` only where there is no
other; two with fewer blocks, see `SMALLER`), of transformers a small configuration; all with random weights, in scope
`all`, each in a process of its own with a limit of time. Of each it is noted: whether it was traced; whether ratio 0
gives the same bits; how far the narrow network is from the masked wide one; whether a saved one loads with the same
bits; the MACs that are left; why layers stayed whole; what torch-pruning leaves, which removes half of every layer but
the last.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.zoo import build, close, limit_memory, logits, torch_pruning
from nm_lightning.compression import cost, export, load, save
from nm_lightning.compression.compress import Compressor
from nm_lightning.compression.recipe import Recipe
from nm_lightning.compression.statistics.proof import masked
from nm_lightning.compression.structure.copies import without_data
from nm_lightning.errors import first_line

DOCS = Path(__file__).parent.parent / "docs"
SECONDS = 300  # for each network; its exports get as many
SMALL: dict[str, dict] = {  # of transformers: small settings by the name of the kind
    "resnet": {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 1, 1]},
    "vit": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3},
    "deit": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3},
    "dinov2": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 224},
    "swin": {"embed_dim": 48, "depths": [1, 1, 2, 1], "num_heads": [2, 4, 8, 16]},
    "convnext": {"hidden_sizes": [48, 96, 192, 384], "depths": [1, 1, 2, 1]},
    "regnet": {"embedding_size": 32, "hidden_sizes": [32, 64, 160, 384], "depths": [1, 1, 2, 1], "groups_width": 16},
    "mobilenet_v2": {"depth_multiplier": 0.5},
    "poolformer": {"hidden_sizes": [32, 64, 160, 256], "depths": [1, 1, 2, 1]},
    "levit": {},
    "segformer": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 8]},
    "pvt_v2": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 8]},
    "pvt": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 8]},
    "dinov2_with_registers": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 224},
    "data2vec-vision": {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3
    },
}  # fmt: skip
SMALLER: dict[str, dict] = {  # of timm: networks whose smallest one runs for minutes, by fewer blocks on smaller images
    "timm/deepseek_vit_412m": {"depth": 2, "img_size": 140, "num_classes": 1000},
    "timm/gemma4_vit_167m": {"depth": 2, "img_size": 192, "num_classes": 1000},
}


def smallest() -> dict[str, str]:
    """The network with the fewest parameters of each of timm's modules; they are built without data."""
    import timm

    found = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        sizes = {}
        for name in [name for name in names if not name.startswith("test_")] or names:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
            except Exception:  # it wants data, or a package that is not there
                continue
        found[module] = min(sizes, key=sizes.__getitem__, default=names[0])
    return found


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and two images for it; where weights begin as zeros they are drawn, too."""
    model, images = _as_it_begins(name)
    for own in model.parameters():
        if own.ndim > 1 and not own.any():  # a head of zeros would hide what is wrong
            nn.init.trunc_normal_(own, std=0.02)
    return model, images


def _as_it_begins(name: str) -> tuple[nn.Module, Tensor]:
    if name in SMALLER:
        import timm

        torch.manual_seed(0)
        size = SMALLER[name]["img_size"]
        return timm.create_model(name.removeprefix("timm/"), **SMALLER[name]).eval(), torch.randn(2, 3, size, size)
    if not name.startswith("transformers/"):
        return build(name)
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    torch.manual_seed(0)
    kind = name.removeprefix("transformers/")
    config = AutoConfig.for_model(kind, num_labels=1000, **SMALL[kind])
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    config.architectures = [names if isinstance(names, str) else names[0]]
    return AutoModelForImageClassification.from_config(config).eval(), torch.randn(2, 3, 224, 224)


@torch.no_grad()
def ours(model: nn.Module, images: Tensor) -> Iterator[dict]:
    """What compressing it shows, in steps: after each, all that is known."""
    before = cost(without_data(model), images.to("meta"))
    found = {"parameters": [before.parameters], "macs": [before.macs]}
    start = time.process_time()
    compressor = Compressor(model, images, Recipe.of("prune", ratio=0.5, scope="all"))
    result = compressor()
    found["seconds"] = round(time.process_time() - start, 2)
    after = cost(without_data(result.model), images.to("meta"))
    found["sites"], found["whole"] = len(result.sites), _reasons(result.report.skipped)
    found["parameters"].append(after.parameters)
    found["macs"].append(after.macs)
    yield found
    wide, outputs = logits(model(images)), logits(result.model(images))
    silent = masked(compressor.subject.model, result.sites, result.keep, result.model).eval()
    scale = outputs.abs().max().clamp(min=torch.finfo(outputs.dtype).tiny)  # some begin with a head of zeros
    gap = (outputs - logits(silent(images))).abs().max() / scale
    yield (found := found | {"apart": float(f"{float(gap):.1e}")})
    same = compressor(Recipe.of("prune", ratio=0, scope="all")).model
    yield (found := found | {"same_at_zero": torch.equal(logits(same(images)), wide)})
    with tempfile.TemporaryDirectory() as folder:
        save(result, f"{folder}/small.pt")
        loaded = load(f"{folder}/small.pt", into=copy.deepcopy(model))
    yield found | {"loads": torch.equal(logits(loaded(images)), outputs)}


def _reasons(skipped: dict[str, str]) -> list[list]:
    """The three that keep the most layers whole, without the outputs' own."""
    kept = [reason for reason in skipped.values() if reason != "its neurons are the network's outputs"]
    return [list(pair) for pair in Counter(kept).most_common(3)]


@torch.no_grad()
def exports(model: nn.Module, images: Tensor) -> Iterator[dict]:
    """Whether both exports of the narrow network say what it says."""
    import onnxruntime

    small = Compressor(model, images, Recipe.of("prune", ratio=0.5, scope="all"))().model
    outputs, found = logits(small(images)), {}
    with tempfile.TemporaryDirectory() as folder:
        program = torch.export.load(export(small, images, f"{folder}/small.pt2")).module()
        yield (found := {"pt2": close(logits(program(images)), outputs, 1e-4)})
        session = onnxruntime.InferenceSession(export(small, images, f"{folder}/small.onnx"))
        (given,) = session.get_inputs()
        onnx = torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])
        yield found | {"onnx": close(onnx, outputs, 1e-4)}


def theirs(model: nn.Module, images: Tensor) -> Iterator[dict]:
    """What torch-pruning leaves; run once, so the time is not kept."""
    found = torch_pruning(model, images, timer=lambda work: (0.0, work()))
    yield {"macs": found["macs"], "parameters": found["parameters"]}


PARTS: dict[str, Callable] = {"ours": ours, "torch_pruning": theirs, "exports": exports}


def run_parts(name: str, labels: list[str]) -> None:
    """Print a line of JSON whenever more is known."""
    warnings.filterwarnings("ignore")
    for label in labels:
        last: dict = {}
        try:
            model, images = built(name)
            for last in PARTS[label](model, images):
                print(json.dumps({label: last}), flush=True)
        except Exception as error:  # the page tells what failed
            failure = f"{type(error).__name__}: {first_line(error)[:200]}"
            print(json.dumps({label: last | {"failed": failure}}), flush=True)


def in_a_process(name: str, labels: list[str], seconds: int) -> dict:
    """The same in a process of its own, which may run out of memory or time."""
    command = [sys.executable, __file__, name, "--parts", *labels]
    failure = ""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds, preexec_fn=limit_memory
        )
        told, failure = done.stdout, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as stopped:
        told, failure = stopped.stdout or b"", f"not run: more than {seconds} s"
    found: dict = {}
    for line in told.decode().splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    if failure:
        late = next((label for label in reversed(labels) if label in found), labels[0])
        found |= {label: {"failed": failure} for label in labels if label not in found}
        if labels.index(late) == len(labels) - 1:
            found[late] = found.get(late, {}) | {"failed": failure}
    return found


def left(measured: dict) -> float | None:
    """The share of the MACs that is left; None where it is not known."""
    macs = measured.get("macs", ())
    return macs[1] / macs[0] if len(macs) == 2 else None


def page(rows: list[dict]) -> str:
    """Markdown."""
    traced = [row for row in rows if left(row["ours"]) is not None]
    agree = [row for row in traced if row["ours"].get("apart", 1) <= 1e-4]
    exact = [row for row in traced if row["ours"].get("same_at_zero")]
    loads = [row for row in traced if row["ours"].get("loads")]
    shares = sorted(left(row["ours"]) for row in traced)
    both = [(left(row["ours"]), left(row["torch_pruning"])) for row in traced if left(row["torch_pruning"])]
    tried = [row["exports"] for row in rows if "exports" in row]
    written = {kind: sum(bool(each.get(kind)) for each in tried) for kind in ("pt2", "onnx")}
    middle = f"{shares[len(shares) // 2]:.0%}" if shares else "unknown"
    lines = [
        "# The zoo: timm and transformers",
        "",
        f"One network of each of {sum(row['name'].startswith('timm/') for row in rows)} modules of timm and "
        f"{sum(row['name'].startswith('transformers/') for row in rows)} image classifiers of transformers, with "
        "random weights, at ratio 0.5 in scope `all` (`python benchmarks/zoo_timm.py`). What is not listed has not "
        "been run.",
        "",
        f"- traced and compressed: {len(traced)} of {len(rows)};",
        f"- MACs left in the median: {middle} (0.25 where everything shrinks); {sum(s <= 0.3 for s in shares)} have "
        f"at most 30 % left, {sum(s > 0.6 for s in shares)} more than 60 %;",
        f"- the narrow network says what the masked wide one says, to 1e-4 of the outputs' scale: {len(agree)}, "
        f"of which {sum(not row['ours']['apart'] for row in agree)} by 0, whose branches begin near zero: that says "
        "little; "
        f"ratio 0 gives the same bits: {len(exact)}; a saved one loads with the same bits: {len(loads)};",
        f"- exported: {len(tried)} were tried; {written['pt2']} as pt2 and {written['onnx']} as ONNX say what the "
        "narrow network says;",
        f"- torch-pruning, without settings for any network (heads' numbers, say, can be told to it): "
        f"{sum(left(row['torch_pruning']) is not None for row in rows)} of {len(rows)}. Of the {len(both)} that both "
        f"handle, ours removes as many MACs (to 1 %) on {sum(abs(a - b) <= 0.01 for a, b in both)}, more on "
        f"{sum(a < b - 0.01 for a, b in both)}, fewer on {sum(a > b + 0.01 for a, b in both)}.",
        "",
        "Apart: the largest difference from the masked network, as a share of the outputs' scale. Exports: `not run` "
        "where they were not tried. The last column has the reason that keeps the most layers whole, with their "
        "number, where more than 30 % of the MACs are left.",
        "",
        "| module | network | parameters | MACs | sites | parameters left | MACs left | torch-pruning: MACs left "
        "| apart | ratio 0 | loads | pt2 | ONNX | s (CPU) | what stays whole, or what failed |",
        "| --- | --- |" + " ---: |" * 7 + " --- | --- | --- | --- | ---: | --- |",
    ]
    lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    own, share = row["ours"], left(row["ours"])
    theirs = left(row["torch_pruning"])
    say = {True: "same", False: "differs", None: ""}
    done = row.get("exports", {})
    written = [
        "agrees" if done.get(kind) else "not run" if not done or "not run" in done.get("failed", "") else "fails"
        for kind in ("pt2", "onnx")
    ]
    sizes = own.get("parameters", [0])[0], own.get("macs", [0])[0]
    reasons = "; ".join(f"{count}: {reason}" for reason, count in own.get("whole", ())[:1])
    cells = [
        row["module"],
        f"`{row['name'].partition('/')[2]}`",
        f"{sizes[0] / 1e6:.1f} M",
        f"{sizes[1] / 1e9:.2f} G",
        str(own.get("sites", "")),
        f"{own['parameters'][1] / own['parameters'][0]:.0%}" if share is not None else "",
        f"{share:.0%}" if share is not None else "failed",
        f"{theirs:.0%}" if theirs is not None else "failed",
        f"{own['apart']:.0e}" if "apart" in own else "",
        say[own.get("same_at_zero")],
        say[own.get("loads")],
        *written,
        f"{own['seconds']:.1f}" if "seconds" in own else "",
        own.get("failed", "") or (reasons if share is not None and share > 0.3 else ""),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Examine what is named or lacking, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="timm's modules, or transformers/<kind>; all that lack by default")
    parser.add_argument("--exports", action="store_true", help="write the exports of those that lack them (slow)")
    parser.add_argument(
        "--seconds", type=int, default=SECONDS, help="limit of time for a network (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=DOCS / "zoo_timm.jsonl", help="a line of JSON for each network")
    parser.add_argument("--table", action="store_true", help="only write the page beside the output")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts:
        run_parts(args.modules[0], args.parts)
        return
    lines = args.output.read_text().splitlines() if args.output.is_file() else []
    rows = {row["module"]: row for row in map(json.loads, lines)}

    def keep(row: dict) -> None:
        rows[row["module"]] = row
        args.output.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
        args.output.with_suffix(".md").write_text(page([rows[key] for key in sorted(rows)]))
        print(json.dumps(row), flush=True)

    if not args.table:
        small = {f"transformers/{kind}": f"transformers/{kind}" for kind in SMALL}
        names = {module: row["name"] for module, row in rows.items()} | small
        if not names.keys() >= set(args.modules or ["all"]):
            names = {module: f"timm/{name}" for module, name in smallest().items()} | small
        for module in args.modules or names:
            if args.modules or module not in rows:
                found = in_a_process(names[module], ["ours", "torch_pruning"], args.seconds)
                keep({"module": module, "name": names[module], **found})
        if args.exports:
            for row in sorted(rows.values(), key=lambda row: row["ours"].get("parameters", [1e12])[0]):
                if "exports" not in row and "loads" in row["ours"] and row["module"] in (args.modules or rows):
                    keep(row | in_a_process(row["name"], ["exports"], args.seconds))
    args.output.with_suffix(".md").write_text(page([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
