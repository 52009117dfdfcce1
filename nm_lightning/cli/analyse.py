"""compress.py --analyse: where a network is sensitive, without compressing it."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from lightning_fabric import Fabric
from rich import get_console
from torch.utils.data import DataLoader, Subset

from nm_lightning.cli.grid import TARGETS, Grid, appearing, introduce, started
from nm_lightning.cli.sources import Source
from nm_lightning.compression import cost
from nm_lightning.data.unlabelled import draw
from nm_lightning.errors import InputError
from nm_lightning.measure import dealt, on_device
from nm_lightning.reporting.results import installed
from nm_lightning.reporting.sensitivity import print_sites, write_analysis
from nm_lightning.sensitivity import sensitivity

RATIOS = (0.1, 0.3, 0.5)


def run_analysis(source: Source, grid: Grid, output: Path, fabric: Fabric, images: int, command: str = "") -> dict:
    """Remove shares of one site at a time, measure, and write a report with a plot; no network is written.

    Args:
        source: the network and its data.
        grid: one method and one criterion, with their settings; its ratios are the shares, 10, 30 and 50 % by default.
        output: see `run_grid`.
        fabric: see `run_grid`.
        images: of the test set, drawn by seed, to measure on.
        command: that repeats it.

    Returns:
        What report.json holds.

    Raises:
        InputError: a setting that does not fit, found before anything is evaluated.
    """
    check(grid, images)
    if not source.by.labelled:
        raise InputError("--analyse measures accuracy: it needs batches of inputs and class labels, and logits")
    grid = replace(grid, ratios=sorted(set(grid.ratios or RATIOS)))
    recipes = grid.recipes(source.name, source.data_name)
    network, compressor, ranks, about = started(source, grid, recipes, fabric)
    with appearing(output) if ranks.rank == 0 else nullcontext() as folder:
        introduce(source, about, compressor, recipes[:1])
        loader = source.by.loader
        chosen = draw(len(loader.dataset), images, recipes[0].seed).tolist()
        options = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
        loader = DataLoader(Subset(loader.dataset, chosen), loader.batch_size, **options)
        batches = list(on_device(dealt(loader, ranks), source.loaders.hooks, fabric.device))
        accuracy, sites, refused = sensitivity(compressor, recipes, batches, network, source.loaders.keys)
        size = cost(network, compressor.subject.example)
        report = about | {
            "left_alone": {**about["left_alone"], **refused},
            "command": command,
            "versions": installed(),
            "method": recipes[0].method.label,
            "criterion": recipes[0].criterion.label,
            "ratios": list(grid.ratios),
            "recipe": recipes[0].to_dict(),
            "images": len(chosen),
            "baseline": {"accuracy": accuracy, "parameters": size.parameters, "macs": size.macs},
            "sites": [asdict(site) for site in sites],
        }
        if folder is not None:
            write_analysis(folder, report)
    print_sites(get_console(), report)
    get_console().print(f"report and plot: {output}/", soft_wrap=True)
    return report


def check(grid: Grid, images: int) -> None:
    """Raise `InputError` for what has no sense here."""
    if images < 1:
        raise InputError(f"analyse {images}: give the number of test images to measure on, from 1")
    for name, values in (("method", grid.methods), ("criterion", grid.criteria)):
        if len(values) > 1:
            raise InputError(f"--{name} {' '.join(values)}: --analyse takes one")
    asked = [name for name in ("widths", *TARGETS) if name in grid.settings]
    asked += [name for name in ("latency", "export") if getattr(grid, name)]
    if asked:
        raise InputError(
            f"--analyse removes shares of one site at a time and writes no network: leave out --{asked[0]}"
        )
