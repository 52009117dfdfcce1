"""The whole grid of methods, criteria and ratios on one loaded network."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich import get_console

from nm_lightning.cli.launch import launch
from nm_lightning.cli.sources import Source
from nm_lightning.compression import CompressionResult, Compressor, Recipe
from nm_lightning.compression.files.checkpoint import sha256, write
from nm_lightning.compression.files.export import FORMATS, check_format, export
from nm_lightning.compression.files.partial import alone, hold, reason, sweep
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.structure.plan import compose, prefixed
from nm_lightning.data import TrainingImages
from nm_lightning.errors import InputError
from nm_lightning.measure import Measure, Result
from nm_lightning.presets import filled
from nm_lightning.reporting.files import write_files
from nm_lightning.reporting.lineage import RUNS_KEY
from nm_lightning.reporting.results import assemble, print_table

NOTES = 6  # lines of them on the terminal
TARGETS = ("target_parameters", "target_macs")


@dataclass
class Grid:
    """What to run.

    Attributes:
        methods: by name.
        criteria: by name.
        ratios: shares of neurons to remove; None where something else says how many.
        settings: of the recipes, but for those three, as far as they were given.
        calibration: `data`, `synthetic`, or a folder of images.
        latency: whether to measure it.
        export: formats of further files.
    """

    methods: Sequence[str]
    criteria: Sequence[str]
    ratios: Sequence[float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = "data"
    latency: bool = False
    export: Sequence[str] = ()

    def recipes(self, model: str, data: str) -> list[Recipe]:
        """Every method with every criterion at every ratio; what was not given is the preset's or has its default.

        Raises:
            InputError: a setting that is not known, out of its range, or beside another that says the same.
        """
        settings, ratios = dict(self.settings), self.ratios
        target = next((name for name in TARGETS if name in settings), None)
        if target and (ratios is not None or "widths" in settings):
            raise InputError(f"give --{target} or --ratio or --widths, not both")
        settings = filled(settings | ({"ratio": None} if ratios is not None else {}), model, data)
        settings.pop("ratio", None)
        widths = settings.get("widths")
        if target or (widths is not None and not isinstance(widths, Mapping)):
            ratios = [{}]
        else:  # sites that widths do not name keep their neurons
            ratios = [{"ratio": ratio} for ratio in ratios or [0.5 if widths is None else 0.0]]
        return [
            Recipe.of(method, criterion, **{**settings, **ratio})
            for method, criterion, ratio in itertools.product(self.methods, self.criteria, ratios)
        ]


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
    recipes = grid.recipes(name, data_name)
    network = module.model.to(device).eval()
    example = module.example_input.to(device)
    compressor = Compressor(network, example, recipes[0])
    for name_of_format in grid.export:
        check_format(name_of_format)
    for recipe in recipes:
        recipe.check_images(grid.calibration)
        recipe.budget.check(compressor.subject)

    launch(fabric)
    ranks = Ranks(fabric.strategy)
    console.quiet |= ranks.rank > 0
    calibration, images = None, 0
    if any(recipe.looks for recipe in recipes):
        size, seed = recipes[0].calibration_size, recipes[0].seed
        calibration = data.calibration_images(grid.calibration, size, seed, ranks)
        images = int(ranks.total(torch.tensor(len(calibration), device=device))[0])
    training = TrainingImages(data, device, ranks) if any(recipe.trains for recipe in recipes) else None
    compressor.look_at(calibration, fabric.strategy, training)

    with _appearing(output) if ranks.rank == 0 else nullcontext() as folder:
        console.print(f"{name} on {data_name}, from {source.origin}", soft_wrap=True)
        for line in _settings(compressor, recipes):
            console.print(line, soft_wrap=True)
        if source.origin == "random weights":
            console.print("note: random weights: give --checkpoint PATH or --weights DEFAULT", soft_wrap=True)
        if calibration is not None:
            console.print(f"calibration: {images} images, {grid.calibration}, no labels", soft_wrap=True)
        if ranks.size > 1:
            console.print(f"{ranks.size} ranks, {type(fabric.strategy).__name__}", soft_wrap=True)
        measure = Measure(example, data.test_dataloader(), data, ranks, grid.latency)
        baseline = measure.original(network)
        results: list[Result] = []
        for recipe in recipes:
            file = f"{recipe.method.label}_{recipe.criterion.label}_{recipe.budget.says}.ckpt"
            compressed, result = measure.compressed(compressor, recipe, file)
            results.append(result)
            if folder is None:
                continue
            _save_checkpoint(folder / file, source, compressed)
            for ending in grid.export:
                export(compressed.model, example, (folder / file).with_name(file.removesuffix("ckpt") + ending))
        about = {"title": f"{name} on {data_name}", "model": name, "data": data_name, "origin": source.origin}
        if calibration is not None:
            about |= {"calibration": grid.calibration, "calibration_size": images}
        about |= {
            "left_alone": compressor.skipped,
            "command": command,
            "device": str(device),
            "ranks": ranks.size,
            "checkpoint_sha256": sha256(source.path),
            RUNS_KEY: source.runs,
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


def _settings(compressor: Compressor, recipes: Sequence[Recipe]) -> Iterator[str]:
    """The sites, and each method's settings, a line each."""
    sites = [site.name for site in compressor.subject.sites]
    yield f"sites {', '.join(sites[:6])}" + (f", ... ({len(sites)})" if len(sites) > 6 else "")
    for method in dict.fromkeys(recipe.method for recipe in recipes):
        own = {name: value for name, value in method.to_dict().items() if name != "name"}
        if own:
            yield f"{method.label}: {', '.join(f'{name} {value}' for name, value in own.items())}"


def _save_checkpoint(path: Path, source: Source, compressed: CompressionResult) -> None:
    """A Lightning checkpoint of the narrow module: `ImageClassifier.load_from_checkpoint` needs nothing else."""
    write(
        path,
        {f"model.{key}": value.cpu() for key, value in compressed.model.state_dict().items()},
        compose(source.module.compression_plan, prefixed(compressed.plan, "model")),
        compressed.recipe,
        hyper_parameters=dict(source.module.hparams),
        **({RUNS_KEY: source.runs} if source.runs else {}),
        datamodule_hyper_parameters=dict(source.data.hparams),
    )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes `output` when the block ends well and vanishes when it does not.

    What killed runs have left beside it is swept.
    """
    folder, held = None, None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with alone(output.parent):
            others = [other.name.rpartition(".")[0] for other in sweep(output.parent, r"\..+\.[a-z0-9_]{8}\.partial")]
            if f".{output.name}" in [other.rpartition(".")[0] for other in others]:
                raise InputError(f"output {str(output)!r} is being written by another run: give another --output DIR")
            if output.exists() and not (output.is_dir() and os.access(output, os.W_OK)):
                raise PermissionError("not a folder with write permission")
            folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".partial"))
            held = hold(folder)
        folder.chmod(0o755)
        yield folder
        if not (folder.is_dir() and os.path.samestat(folder.stat(), os.fstat(held))):
            raise FileNotFoundError("its folder vanished under way")
        if not output.exists():
            folder.rename(output)
        else:
            for old in _written_before(output):
                old.unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == "report.json"):
                file.replace(output / file.name)
    except OSError as error:
        why = reason(error)
        raise InputError(f"output {str(output)!r} can't be written ({why}): give another --output DIR") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _written_before(output: Path) -> list[Path]:
    """The checkpoints that the folder's last report tells of."""
    try:
        rows = json.loads((output / "report.json").read_text())["results"]
        stems = [Path(row["checkpoint"]).name.removesuffix("ckpt") for row in rows]
        return [output / f"{stem}{ending}" for stem in stems for ending in ("ckpt", *FORMATS)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
