"""Train an image classifier: `python train.py`, or `python train.py --config configs/resnet56_cifar10.yaml`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from nm_lightning.cli.errors import fail, one_line_errors
from nm_lightning.cli.start import Start
from nm_lightning.compression.files.checkpoint import check_weights, read
from nm_lightning.data import build_data
from nm_lightning.errors import InputError
from nm_lightning.modules import ImageClassifier
from nm_lightning.presets import CONFIGS
from nm_lightning.reporting.lineage import Lineage, known_runs
from nm_lightning.reporting.weights_and_biases import offline_without_account

RUNS = Path("runs")
QUIET = ("Checkpoint directory", ".*treespec, LeafSpec", "The number of training batches", ".*flops_per_batch")
DEFAULT_CONFIG = CONFIGS / "lenet_300_100_fashion_mnist.yaml"


class OneLineLightningParser(LightningArgumentParser):
    """Lightning's parser without the usage text before an error."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Exit with the message alone."""
        fail(f"{message} (see --help)")


def run_folder(experiment: str | None, model: str, data: str) -> str:
    """`runs/<experiment>`, named after network and data where no name is given."""
    return str(RUNS / (experiment or f"{model.replace('/', '_')}_{data}"))


def pretrained_transforms(model: str, weights: str | None, start: str | None) -> str | None:
    """What the data module needs to know of pretrained weights, or of those that a checkpoint was trained from."""
    if weights is None and start is not None:
        return Start.at(start).data.get("transforms_of")
    return f"{model}:{weights}" if weights else None


class SaveConfig(SaveConfigCallback):
    """The run's configuration goes beside its checkpoints, whatever the logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`."""
        folder = Path(trainer.checkpoint_callback.dirpath if trainer.checkpoint_callback else trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class RandomState(Callback):
    """A checkpoint brings the random numbers' state: a run that is resumed goes on as if it had never stopped."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Of the CPU, and of this process's GPU where there is one."""
        return {device: module.get_rng_state() for device, module in self._devices().items()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Go on from there."""
        for device, module in self._devices().items():
            if device in state_dict:
                module.set_rng_state(state_dict[device])

    @staticmethod
    def _devices() -> dict[str, Any]:
        return {"cpu": torch.random} | ({"cuda": torch.cuda} if torch.cuda.is_available() else {})


class TrainCLI(LightningCLI):
    """Class count and image shape come from the data; checkpoints and logs go to `runs/<experiment>`."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser with one-line errors."""
        parser = OneLineLightningParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a YAML file of these options")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """What is started from says network and data, and `configs/finetune.yaml` the rest, where nothing else does."""
        super().parse_arguments(parser, args)
        self.start = Start.at(self.config["from"]) if self.config["from"] else None
        if self.start is not None:
            parser.default_config_files = [str(CONFIGS / "finetune.yaml")]
            parser.set_defaults(self.start.defaults())
            super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own options, and what is known from others."""
        parser.add_argument("--experiment", type=str | None, help="name of the run's folder (<model>_<data>)")
        parser.add_argument(
            "--from", type=str | None, help="checkpoint to start from, compressed or not: its network, weights and data"
        )
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to resume from, such as runs/x/last.ckpt")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        parser.link_arguments(("experiment", "model.name", "data.name"), "checkpoint.dirpath", run_folder)
        parser.link_arguments(("model.name", "model.weights", "from"), "data.transforms_of", pretrained_transforms)
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.input_shape", "model.input_shape", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A CSV logger in the run's folder (a new `version_<n>` each time), where no other logger is asked for."""
        folder = Path(self.config["checkpoint"]["dirpath"])
        if self.config["trainer"]["logger"] is None:
            kwargs["logger"] = CSVLogger(folder.parent, folder.name)
        trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        trainer.callbacks += [RandomState(), Lineage(known_runs(self.start.content) if self.start else [])]
        if trainer.checkpoint_callbacks:  # `save_last` would only follow the best
            trainer.callbacks.append(ModelCheckpoint(folder, "last", enable_version_counter=False))
        if trainer.loggers:
            images = ThroughputMonitor(lambda batch: len(batch[1]), window_size=10)
            trainer.callbacks += [LearningRateMonitor("epoch"), images]
        return trainer


def check_resumable(ckpt_path: str, module: ImageClassifier) -> None:
    """Raise `InputError` unless the file is a checkpoint of a training run of this network."""
    checkpoint = read(ckpt_path)
    if "optimizer_states" not in checkpoint:
        raise InputError(f"ckpt_path {ckpt_path!r} holds no state of a training run: give a run's last.ckpt")
    module.on_load_checkpoint(checkpoint)  # one that was trained on after a compression is narrow
    check_weights(module, checkpoint["state_dict"], ckpt_path)


def main(arguments: list[str] | None = None) -> None:
    """Train, then test the best checkpoint."""
    offline_without_account()
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    with one_line_errors():
        cli = TrainCLI(
            ImageClassifier,
            build_data,
            run=False,
            args=arguments,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"default_config_files": [str(DEFAULT_CONFIG)]},
        )
        if cli.start is not None:
            cli.start.fill(cli.model)
        ckpt_path = cli.config["ckpt_path"]
        if ckpt_path:
            check_resumable(ckpt_path, cli.model)
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
        best = cli.trainer.checkpoint_callback.best_model_path
        if best:
            metrics = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False, weights_only=True)[0]
            rank_zero_only(print)(f"test accuracy {100 * metrics['test/accuracy']:.2f} % ({best})")


if __name__ == "__main__":
    main()
