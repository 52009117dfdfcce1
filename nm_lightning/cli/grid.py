"""The whole grid of methods, criteria and ratios on one loaded network."""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich import get_console

from nm_lightning.cli.launch import launch
from nm_lightning.cli.presets import preset
from nm_lightning.cli.sources import Source
from nm_lightning.compression import CompressionResult, compress, cost, trace
from nm_lightning.compression.checkpoint import sha256, write
from nm_lightning.compression.export import FORMATS, check_format, export
from nm_lightning.compression.fold import compose, prefixed
from nm_lightning.compression.methods import Options
from nm_lightning.compression.ranks import Ranks
from nm_lightning.compression.report import similarity
from nm_lightning.compression.select import budget, check_ratio, check_target, choose
from nm_lightning.errors import InputError
from nm_lightning.modules import evaluate
from nm_lightning.modules.latency import latency
from nm_lightning.reporting.files import write_files
from nm_lightning.reporting.results import Baseline, Result, assemble, print_table

NOTES = 6  # lines of them on the terminal


@dataclass
class Grid:
    """What to run, by the names of the flags; None leaves a setting to the preset of the network and its data."""

    method: Sequence[str]
    criterion: Sequence[str]
    ratio: Sequence[float] | None
    widths: Sequence[int] | Mapping[str, int] | None
    target_parameters: float | None
    target_macs: float | None
    sites: Sequence[str] | None
    scope: str
    threshold: float | None
    lamda: float | None
    formulation: str
    implementation: str
    calibration: str
    calibration_size: int
    ridge: float
    reconstruction: str
    refit: int
    recalibrate_norm: bool
    finetune: int
    latency: bool
    export: Sequence[str]
    seed: int


def run_grid(source: Source, grid: Grid, output: Path, fabric: Fabric, command: str = "") -> dict:
    """Evaluate the original and every compressed network; write the report, the plot and the checkpoints.

    Args:
        source: the network and its data.
        grid: what to run.
        output: folder that appears, or is updated, when all is complete; rank 0 alone writes it.
        fabric: Lightning's, on whose devices the work is done; launched here, once all settings are checked.
        command: that repeats it.

    Returns:
        What report.json holds.

    Raises:
        InputError: a setting that does not fit, found before anything is evaluated.
    """
    console, device = get_console(), fabric.device
    module, data = source.module, source.data
    name, data_name = module.hparams.name, data.hparams.name
    defaults = preset(name, data_name)
    patterns = grid.sites if grid.sites is not None else defaults.sites
    threshold = grid.threshold if grid.threshold is not None else defaults.threshold
    lamda = grid.lamda if grid.lamda is not None else defaults.lamda
    widths = grid.widths
    targets = {"parameters": grid.target_parameters, "macs": grid.target_macs}
    targets = {name: share for name, share in targets.items() if share is not None}
    if targets and (grid.ratio is not None or widths is not None):
        raise InputError(f"give --target_{next(iter(targets))} or --ratio or --widths, not both")
    if widths is None and grid.ratio is None and grid.sites is None and not targets:
        widths = defaults.widths
    fixed = widths is not None and not isinstance(widths, Mapping)
    ratios = [None] if fixed or targets else grid.ratio or ([None] if widths else [0.5])

    network = module.model.to(device).eval()
    example = module.example_input.to(device)
    sites = choose(trace(network, example, grid.scope).sites, patterns)
    for name_of_format in grid.export:
        check_format(name_of_format)
    shared = {"threshold": threshold, "lamda": lamda}
    for setting in fields(Options):
        if setting.name not in ("method", "criterion", *shared):
            shared[setting.name] = getattr(grid, setting.name)
    cells = [Options(method, criterion, **shared) for method in grid.method for criterion in grid.criterion]
    for options in cells:
        options.check_images(grid.calibration)
    for name_of_target, share in targets.items():
        check_target(name_of_target, share)
    for ratio in ratios:
        check_ratio(ratio or 0)
        budget(sites, ratio or 0, widths, defaults.rounding)

    launch(fabric)
    ranks = Ranks(fabric.strategy)
    console.quiet |= ranks.rank > 0
    calibration, images = None, 0
    if targets or any(options.looks for options in cells):
        calibration = data.calibration_images(grid.calibration, grid.calibration_size, grid.seed, ranks)
        images = int(ranks.total(torch.tensor(len(calibration), device=device))[0])

    with _appearing(output) if ranks.rank == 0 else nullcontext() as folder:
        console.print(f"{name} on {data_name}, from {source.origin}", soft_wrap=True)
        listed = ", ".join(site.name for site in sites[:6]) + (f", ... ({len(sites)})" if len(sites) > 6 else "")
        console.print(f"sites {listed}; threshold {threshold:g}, lamda {lamda:g}, {grid.formulation}", soft_wrap=True)
        if source.origin == "random weights":
            console.print("note: random weights: give --checkpoint PATH or --weights DEFAULT", soft_wrap=True)
        if calibration is not None:
            console.print(f"calibration: {images} images, {grid.calibration}, no labels", soft_wrap=True)
        if ranks.size > 1:
            console.print(f"{ranks.size} ranks, {type(fabric.strategy).__name__}", soft_wrap=True)
        before = cost(network, example)
        loader = data.test_dataloader()
        accuracy = evaluate(network, loader, data, device, "original", ranks)
        baseline = Baseline(accuracy, before.parameters, before.macs, latency(network, example) if grid.latency else [])
        results: list[Result] = []
        for method, criterion, ratio in itertools.product(grid.method, grid.criterion, ratios):
            start = time.perf_counter()
            compressed = compress(
                network,
                example,
                method,
                criterion,
                ratio or 0.0,
                widths=widths,
                sites=patterns,
                scope=grid.scope,
                rounding=defaults.rounding,
                calibration=calibration,
                calibration_size=grid.calibration_size,
                target_parameters=grid.target_parameters,
                target_macs=grid.target_macs,
                strategy=fabric.strategy,
                **shared,
            )
            seconds = time.perf_counter() - start
            label = "widths" if ratio is None else f"{ratio:g}"
            label = next((f"{name}{share:g}" for name, share in targets.items()), label)
            file = f"{method}_{criterion}_{label}.ckpt"
            accuracy = evaluate(compressed.model, loader, data, device, f"{method} {criterion} {label}", ranks)
            after = cost(compressed.model, example)
            total = sum(site.before for site in compressed.report.sites)
            results.append(
                Result(
                    method,
                    criterion,
                    ratio,
                    accuracy,
                    after.parameters,
                    after.macs,
                    round(seconds, 3),
                    compressed.report.widths,
                    compressed.report.notes,
                    file,
                    1 - sum(compressed.report.widths.values()) / total if total else 0.0,
                    compressed.report.sites,
                    similarity(network, sites, compressed.keep),
                    latency(compressed.model, example) if grid.latency else [],
                )
            )
            if folder is None:
                continue
            _save_checkpoint(folder / file, source, compressed)
            for ending in grid.export:
                export(compressed.model, example, (folder / file).with_name(file.removesuffix("ckpt") + ending))
        skipped = compressed.report.skipped
        about = {"title": f"{name} on {data_name}", "model": name, "data": data_name, "origin": source.origin}
        about |= {"threshold": threshold, "lamda": lamda, "formulation": grid.formulation}
        if calibration is not None:
            about |= {"calibration": grid.calibration, "calibration_size": images, "ridge": grid.ridge}
            about |= {f"target_{name}": share for name, share in targets.items()}
            about |= {name: getattr(grid, name) for name in ("refit", "recalibrate_norm", "finetune", "seed")}
        about |= {"implementation": grid.implementation, "left_alone": skipped}
        about |= {
            "command": command,
            "device": str(device),
            "ranks": ranks.size,
            "checkpoint_sha256": sha256(source.path),
        }
        report = assemble(about, baseline, results)
        if folder is not None:
            write_files(folder, report)

    print_table(console, report)
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    for note in notes[:NOTES]:
        console.print(f"note: {note}", soft_wrap=True)
    if len(notes) > NOTES:
        console.print(f"note: {len(notes) - NOTES} more in report.html", soft_wrap=True)
    console.print(f"report, plot and checkpoints: {output}/", soft_wrap=True)
    return report


def _save_checkpoint(path: Path, source: Source, compressed: CompressionResult) -> None:
    """A Lightning checkpoint of the narrow module: `ImageClassifier.load_from_checkpoint` needs nothing else."""
    write(
        path,
        {f"model.{key}": value.cpu() for key, value in compressed.model.state_dict().items()},
        compose(source.module.compression_plan, prefixed(compressed.plan, "model")),
        hyper_parameters=dict(source.module.hparams),
        datamodule_hyper_parameters=dict(source.data.hparams),
    )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes `output` when the block ends well and vanishes when it does not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        if output.exists() and not (output.is_dir() and os.access(output, os.W_OK)):
            folder.rmdir()
            raise PermissionError("not a folder with write permission")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"output {str(output)!r} can't be written ({reason}): give another --output DIR") from error
    folder.chmod(0o755)
    try:
        yield folder
        if not output.exists():
            folder.rename(output)
        else:
            for old in _written_before(output):
                old.unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == "report.json"):
                file.replace(output / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written_before(output: Path) -> list[Path]:
    """The checkpoints that the folder's last report tells of."""
    try:
        rows = json.loads((output / "report.json").read_text())["results"]
        stems = [Path(row["checkpoint"]).name.removesuffix("ckpt") for row in rows]
        return [output / f"{stem}{ending}" for stem in stems for ending in ("ckpt", *FORMATS)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
