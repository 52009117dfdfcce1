"""The whole grid of methods, criteria and ratios on one loaded network."""

import itertools
import json
import os
import shlex
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
from torch import nn

from nm_lightning.cli.flags import recipe_words
from nm_lightning.cli.launch import launch
from nm_lightning.cli.sources import Source
from nm_lightning.compression import CompressionResult, Compressor, Recipe
from nm_lightning.compression.files.checkpoint import sha256, write
from nm_lightning.compression.files.export import FORMATS, check_format, export
from nm_lightning.compression.files.partial import alone, hold, reason, sweep
from nm_lightning.compression.files.quantize import check_kind, quantize
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.structure.inputs import length
from nm_lightning.compression.structure.plan import compose, prefixed
from nm_lightning.errors import InputError
from nm_lightning.measure import Measure, Result, odd_widths
from nm_lightning.presets import filled, preset
from nm_lightning.reporting.files import write_files
from nm_lightning.reporting.lineage import RUNS_KEY
from nm_lightning.reporting.results import assemble, featured, print_table

SOME = ("results.csv", "accuracy.png", "sensitivity.png")
NOTES = 6  # lines of them on the terminal
TARGETS = ("target_parameters", "target_macs", "target_latency")


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
        quantize: `int8` for one more in 8 bits, measured beside the ONNX file that it is made of.
        source: words of the command line that say what is compressed, for the command of each result.
    """

    methods: Sequence[str]
    criteria: Sequence[str]
    ratios: Sequence[float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = "data"
    latency: bool = False
    export: Sequence[str] = ()
    quantize: str | None = None
    source: Sequence[str] = ()

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
    console, recipes = get_console(), grid.recipes(source.name, source.data_name)
    formats = dict.fromkeys([*grid.export, *(["onnx"] if grid.quantize else [])])
    for name_of_format in formats:
        check_format(name_of_format)
    if grid.quantize:
        check_kind(grid.quantize)
    network, compressor, ranks, about = started(source, grid, recipes, fabric)
    example = compressor.subject.example

    with appearing(output) if ranks.rank == 0 else nullcontext() as folder:
        introduce(source, about, compressor, recipes)
        loaders, notes = source.loaders, list(source.notes)
        loader, own = source.by.loader if source.by.labelled else None, loaders.metrics(source.by, ranks, notes)
        measure = Measure(example, loader, loaders.hooks, ranks, grid.latency, loaders.keys, own)
        baseline = measure.original(network)
        results: list[Result] = []
        for recipe in recipes:
            file = f"{recipe.method.label}_{recipe.criterion.label}_{recipe.budget.says}.ckpt"
            compressed, result = measure.compressed(compressor, recipe, file)
            result.command = again(source, grid, recipe)
            results.append(result)
            if folder is None:
                continue
            _save_checkpoint(folder / file, source, compressed)
            files = {ending: folder / (file.removesuffix("ckpt") + ending) for ending in formats}
            for path in files.values():
                export(compressed.model, example, path)
            if grid.quantize:
                small = quantize(files["onnx"], compressor.subject.batches, grid.quantize)
                result.exported = [measure.exported(path) for path in (files["onnx"], small)]
        odd_widths(baseline, results, network)
        if not source.by.labelled and not baseline.logged:
            notes.append("accuracy was not measured: it needs batches of inputs and class labels, and logits")
        for result in results:
            result.notes += dict.fromkeys(notes)
        report = assemble({**about, "command": command}, baseline, results)
        if folder is not None:
            write_files(folder, report)

    print_table(console, report)
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    for note in notes[:NOTES]:
        console.print(f"note: {note}", soft_wrap=True)
    if len(notes) > NOTES:
        console.print(f"note: {len(notes) - NOTES} more in report.html", soft_wrap=True)
    console.print(f"again: {featured(report)['command']}", soft_wrap=True)
    console.print(f"report, plot and checkpoints: {output}/", soft_wrap=True)
    return report


def again(source: Source, grid: Grid, recipe: Recipe) -> str:
    """The command that gives a cell's result, from whatever the command line left to defaults and presets."""
    words = list(grid.source)
    if source.path is not None and "--checkpoint" not in words:
        words = ["--checkpoint", str(source.path), *words]
    known = preset(source.name, source.data_name)
    return shlex.join(["python", "compress.py", *words, *recipe_words(recipe, known)])


def started(
    source: Source, grid: Grid, recipes: Sequence[Recipe], fabric: Fabric
) -> tuple[nn.Module, Compressor, Ranks, dict[str, Any]]:
    """Check the settings, launch the ranks, and read the calibration images.

    Returns:
        The network, its compressor, the ranks, and what every report says of them.
    """
    device, loaders = fabric.device, source.loaders
    network, loaders.device = source.network.to(device).eval(), device
    compressor = Compressor(network, source.example.to(device), recipes[0])
    if not compressor.subject.sites:
        why = next((f": {name}: {why}" for name, why in compressor.skipped.items()), "")
        raise InputError(f"nothing in {source.name} can be compressed{why}")
    for recipe in recipes:
        recipe.budget.check(compressor.subject)
    launch(fabric)
    ranks, calibration = Ranks(fabric.strategy), None
    get_console().quiet |= ranks.rank > 0
    about = {"title": source.title, "model": source.name, "data": source.data_name, "origin": source.origin}
    if grid.quantize or any(recipe.looks for recipe in recipes):
        size, seed = recipes[0].calibration_size, recipes[0].seed
        calibration = loaders.images(grid.calibration, size, seed, ranks)
    training = loaders.training_inputs(ranks) if any(recipe.trains for recipe in recipes) else None
    compressor.look_at(calibration, fabric.strategy, training)
    if calibration is not None:
        count = sum(map(length, compressor.subject.batches))
        images = int(ranks.total(torch.tensor(count, device=device))[0])
        about |= {"calibration": grid.calibration, "calibration_size": images}
    about |= {"left_alone": compressor.skipped, "device": str(device), "ranks": ranks.size}
    return network, compressor, ranks, about | {"checkpoint_sha256": sha256(source.path), RUNS_KEY: source.runs}


def introduce(source: Source, about: Mapping[str, Any], compressor: Compressor, recipes: Sequence[Recipe]) -> None:
    """Say on the terminal what is about to be done, a line each."""
    lines = [f"{about['title']}, from {source.origin}", *_settings(compressor, recipes)]
    if source.origin == "random weights":
        lines.append("note: random weights: give --checkpoint PATH or --weights DEFAULT")
    if "calibration" in about:
        lines.append(f"calibration: {about['calibration_size']} images, {about['calibration']}, no labels")
    if about["ranks"] > 1:
        lines.append(f"{about['ranks']} ranks, {type(compressor.subject.ranks.strategy).__name__}")
    for line in lines:
        get_console().print(line, soft_wrap=True)


def _settings(compressor: Compressor, recipes: Sequence[Recipe]) -> Iterator[str]:
    """The sites, and each method's settings, a line each."""
    sites = [site.name for site in compressor.subject.sites]
    yield f"sites {', '.join(sites[:6])}" + (f", ... ({len(sites)})" if len(sites) > 6 else "")
    for method in dict.fromkeys(recipe.method for recipe in recipes):
        own = {name: value for name, value in method.to_dict().items() if name != "name"}
        if own:
            yield f"{method.label}: {', '.join(f'{name} {value}' for name, value in own.items())}"


def _save_checkpoint(path: Path, source: Source, compressed: CompressionResult) -> None:
    """The narrow network's, as the original's was: of a LightningModule, one that its class loads."""
    start = f"{source.prefix}." if source.prefix else ""
    plan = prefixed(compressed.plan, source.prefix) if source.prefix else compressed.plan
    write(
        path,
        {start + key: value.cpu() for key, value in compressed.model.state_dict().items()},
        compose(source.plan, plan),
        compressed.recipe,
        **source.known,
        **({RUNS_KEY: source.runs} if source.runs else {}),
    )


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
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
    """The checkpoints that the folder's last report tells of, and the files that not every report has."""
    try:
        rows = json.loads((output / "report.json").read_text()).get("results", [])
        stems = [Path(row["checkpoint"]).name.removesuffix("ckpt") for row in rows]
        files = [f"{stem}{ending}" for stem in stems for ending in ("ckpt", *FORMATS)]
        return [output / name for name in (*files, *SOME)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
