"""The project's Weights & Biases workspace as code: the panels for every run of train.py and compress.py.

    python -m nm_lightning.cli.dashboard --wandb_entity my-team            # builds it, prints its address
    python -m nm_lightning.cli.dashboard --wandb_entity my-team --dry_run  # prints what would be sent

It needs `pip install wandb-workspaces` and an account.
"""

import argparse
import warnings

from nm_lightning.cli.errors import OneLineParser, one_line_errors
from nm_lightning.errors import InputError

NAME = "Compression"


def workspace(entity: str, project: str = "nm-lightning"):
    """A `wandb_workspaces.workspaces.Workspace`, not yet saved.

    Args:
        entity: team or user.
        project: of the runs.

    Raises:
        InputError: wandb-workspaces is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydantic, about the package's own models
            import wandb_workspaces.reports.v2 as panels
            import wandb_workspaces.workspaces as spaces
    except ImportError as error:
        raise InputError("the dashboard needs wandb-workspaces: pip install wandb-workspaces") from error

    def over(size: str) -> panels.ScatterPlot:
        x, y = panels.SummaryMetric(f"{size}/after"), panels.SummaryMetric("accuracy/after")
        return panels.ScatterPlot(title=f"accuracy over {size}", x=x, y=y)

    def bars(title: str, *metrics: str) -> panels.BarPlot:
        return panels.BarPlot(title=title, metrics=list(metrics))

    def line(title: str, *metrics: str) -> panels.LinePlot:
        return panels.LinePlot(title=title, y=list(metrics))

    settings = [panels.Config(name) for name in ("method", "criterion", "ratio")]
    across = [panels.ParallelCoordinatesPlotColumn(metric=name) for name in settings]
    across.append(panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric("accuracy/after")))
    before_after = ("accuracy/before", "accuracy/after")
    return spaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            spaces.Section(
                name="What it cost",
                is_open=True,
                panels=[
                    bars("accuracy before and after", *before_after),
                    bars("accuracy lost", "accuracy/drop"),
                    over("parameters"),
                    over("macs"),
                    panels.ParallelCoordinatesPlot(title="method, criterion, ratio", columns=across),
                    bars("seconds", "compression/seconds"),
                ],
            ),
            spaces.Section(
                name="How fast it is",
                panels=[
                    bars(
                        f"ms for an image, batch {batch}",
                        f"latency/before/batch_{batch}",
                        f"latency/after/batch_{batch}",
                    )
                    for batch in (1, 128)
                ],
            ),
            spaces.Section(
                name="Training",
                panels=[
                    line("loss", "train/loss_epoch", "val/loss"),
                    line("top-1", "train/accuracy", "val/accuracy"),
                    line("top-5", "train/top5", "val/top5"),
                    line("learning rate", "lr-SGD", "lr-SGD/pg1"),
                    line("images per second", "train/device/samples_per_sec"),
                ],
            ),
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    """Build it."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wandb_entity", required=True, help="team or user")
    parser.add_argument("--wandb_project", default="nm-lightning", help="of the runs (nm-lightning)")
    parser.add_argument("--dry_run", action="store_true", help="print the specification, send nothing")
    args = parser.parse_args(arguments)
    with one_line_errors():
        space = workspace(args.wandb_entity, args.wandb_project)
        if args.dry_run:
            print(space._to_model().model_dump_json(by_alias=True, indent=2))
            return
        try:
            space.save()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"W&B does not take the dashboard ({reason}): wandb login, then again") from error
        print(space.url)


if __name__ == "__main__":
    main()
