"""Train an image classifier, one of ours or the user's own; thin: Lightning's CLI, and where its files go."""

import os
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from nm_lightning import own_code
from nm_lightning.batches import inputs_and_labels, length_of
from nm_lightning.cli import precision
from nm_lightning.cli.arguments import UNSERIALIZED
from nm_lightning.cli.errors import fail, one_line_errors
from nm_lightning.cli.start import Start
from nm_lightning.compression.files.checkpoint import check_weights, read
from nm_lightning.data import build_data
from nm_lightning.errors import InputError, first_line
from nm_lightning.measure import on_device
from nm_lightning.models import register_own
from nm_lightning.modules import ImageClassifier
from nm_lightning.presets import CONFIGS
from nm_lightning.reporting.lineage import Lineage, known_runs
from nm_lightning.reporting.weights_and_biases import offline_without_account

RUNS = Path("runs")
QUIET = (
    "Checkpoint directory",
    ".*treespec, LeafSpec",
    "The number of training batches",
    "LightningCLI's args parameter",
    ".*flops_per_batch",
    rf"\s*{UNSERIALIZED}",
)
DEFAULT_CONFIG = CONFIGS / "lenet_300_100_fashion_mnist.yaml"


class OneLineLightningParser(LightningArgumentParser):
    """Lightning's parser without the usage text before an error."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Exit with the message alone."""
        fail(f"{message} (see --help)")


def run_folder(experiment: str | None, *parts: Mapping[str, Any]) -> str:
    """`runs/<experiment>`, named after network and data where no name is given."""
    names = [(part.get("name") or part.get("class_path", "")).rpartition(".")[2] for part in parts]
    return str(RUNS / (experiment or re.sub(r"[^\w.-]+", "_", "_".join(names))))


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
        file = folder / "config.yaml"
        self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)
        file.write_text(re.sub(rf".*: {UNSERIALIZED}.*\n", "", file.read_text()))  # the constructor knows its defaults


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
    """Checkpoints and logs go to `runs/<experiment>`; our classifier's class count and image shape come from the data.

    Args:
        own: which of `model` and `data` are classes of the user's own.
        data: whether there is a data module; the user's module may have loaders itself.
        options: of `LightningCLI`.
    """

    def __init__(self, own: Collection[str], data: bool = True, **options: Any):
        self.own, self.has_data = own, data
        kind = LightningDataModule if "data" in own else build_data
        super().__init__(
            LightningModule if "model" in own else ImageClassifier,
            kind if data else None,
            subclass_mode_model="model" in own,
            subclass_mode_data="data" in own,
            **options,
        )

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
            if self.own:
                raise InputError("--from starts our own classifier: load the weights of your own network in its code")
            parser.default_config_files = [str(CONFIGS / "finetune.yaml")]
            parser.set_defaults(self.start.defaults())
            super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own options, and what is known from others."""
        parser.add_argument("--experiment", type=str | None, help="name of the run's folder (<model>_<data>)")
        parser.add_argument(
            "--from", type=str | None, help="checkpoint to start from, compressed or not: its network, weights and data"
        )
        if "model" not in self.own:
            parser.add_argument(
                "--time_precision",
                type=bool,
                default=False,
                help="where no precision is given, take bf16-mixed if a step is faster in it than in float32",
            )
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to resume from, such as runs/x/last.ckpt")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        best = {} if "model" in self.own else {"checkpoint.monitor": "val/accuracy", "checkpoint.mode": "max"}
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
                **best,
            }
        )
        parts = ("experiment", "model", "data") if self.has_data else ("experiment", "model")
        parser.link_arguments(parts, "checkpoint.dirpath", run_folder)
        if not self.own:
            parser.link_arguments(("model.name", "model.weights", "from"), "data.transforms_of", pretrained_transforms)
        if "model" not in self.own:
            parser.link_arguments("data", "model.num_classes", num_classes_of, apply_on="instantiate")
            parser.link_arguments("data", "model.input_shape", input_shape_of, apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Miss what the user's constructors need, which may be None to jsonargparse where it has no type.

        Raises:
            InputError: it is missing.
        """
        for part in sorted(self.own):
            chosen = self.config[part]
            if chosen is None:
                raise InputError(f"{part} is missing: give --{part} module:Class")
            name, given = chosen["class_path"], {**chosen.get("init_args", {}), **chosen.get("dict_kwargs", {})}
            _, needed, _ = own_code.parameters(own_code.find(name, part))
            for argument in needed:
                if given.get(argument) is None:
                    raise InputError(f"{part} {name!r} needs {argument}: give --{part}.{argument} VALUE")

    def instantiate_classes(self) -> None:
        """Lightning's; what the user's constructors raise is bad input.

        Raises:
            InputError: they raise something.
        """
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, InputError):
                cause = cause.__cause__
            if not self.own or isinstance(cause, InputError):
                raise
            names = " or ".join(self.config[part]["class_path"] for part in sorted(self.own))
            raise InputError(f"{names} can't be built: {type(cause).__name__}: {first_line(cause)}") from error

    def _precision(self) -> str:
        """The faster one for this network, and a line of it; over several ranks, which would each decide, float32."""
        trainer, chosen = self.config["trainer"], precision.FULL
        says = f"precision {chosen}: steps are timed in a single process only; give --trainer.precision bf16-mixed"
        if _alone(trainer):
            gpu = torch.cuda.is_available() and trainer["accelerator"] != "cpu"
            images = torch.zeros(self.datamodule.hparams.get("batch_size", 128), *self.model.hparams.input_shape)
            chosen, says = precision.faster(self.model, images, "cuda" if gpu else "cpu")
        rank_zero_only(print)(says)
        return chosen

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A CSV logger in the run's folder (a new `version_<n>` each time), where no other logger is asked for."""
        folder = Path(self.config["checkpoint"]["dirpath"])
        if self.config["trainer"]["logger"] is None:
            kwargs["logger"] = CSVLogger(folder.parent, folder.name)
        if self.config.get("time_precision") and self.config["trainer"]["precision"] is None:
            kwargs["precision"] = self.config["trainer"]["precision"] = self._precision()
        trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        trainer.callbacks += [RandomState(), Lineage(known_runs(self.start.content) if self.start else [])]
        if trainer.checkpoint_callbacks:  # `save_last` would only follow the best
            trainer.callbacks.append(ModelCheckpoint(folder, "last", enable_version_counter=False))
        if trainer.loggers:
            images = ThroughputMonitor(length_of, window_size=10)
            trainer.callbacks += [LearningRateMonitor("epoch"), images]
        return trainer


def _alone(trainer: Mapping[str, Any]) -> bool:
    """Whether a Trainer with these arguments is one process on one device."""
    several = trainer["devices"] not in ("auto", "1", 1) or trainer["num_nodes"] > 1 or "WORLD_SIZE" in os.environ
    return not several and (trainer["devices"] != "auto" or torch.cuda.device_count() <= 1)


def num_classes_of(data: LightningDataModule) -> int:
    """What a data module says."""
    if not hasattr(data, "num_classes"):
        raise InputError(f"data {type(data).__name__!r} does not say how many classes it has: give it num_classes")
    return data.num_classes


def input_shape_of(data: LightningDataModule) -> tuple[int, ...]:
    """What a data module says, or its first batch."""
    if hasattr(data, "input_shape"):
        return data.input_shape
    data.prepare_data()
    data.setup("fit")
    inputs, _ = inputs_and_labels(next(on_device(data.train_dataloader(), data, "cpu")))
    return tuple(inputs.shape[1:])


def translated(arguments: Sequence[str]) -> tuple[list[str], set[str], bool]:
    """`--model NAME` and `--data NAME` as Lightning's CLI reads them.

    A LightningModule is `--model <its path>`; of all others the name is `--model.name`, and the arguments of a plain
    network are `--model.arguments.*`.

    Returns:
        The words, which of `model` and `data` are classes of the user's own, and whether anything is said of `data`.
    """
    words, own, plain, said = [], set(), False, False
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        section = flag.removeprefix("--")
        said |= section.partition(".")[0] == "data"
        if flag in ("-c", "--config"):
            sections = _sections(value if equals else next(iter(rest), ""))
            own |= {part for part, content in sections.items() if "class_path" in content}
            said |= "data" in sections
            name = sections.get("model", {}).get("name")
            if own_code.is_own(name):
                register_own(name)
                plain = True
        if flag == "--model.name" and own_code.is_own(value if equals else next(iter(rest), "")):
            flag, section = "--model", "model"
        if flag not in ("--model", "--data") or Path(value if equals else next(iter(rest), "")).is_file():
            words.append(flag + equals + value)
            continue
        name = value if equals or not rest else rest.pop(0)
        kind = {"model": LightningModule, "data": LightningDataModule}[section]
        found = own_code.find(name, section) if own_code.is_own(name) else None
        if isinstance(found, type) and issubclass(found, kind):
            words.append(f"--{section}={found.__module__}.{found.__qualname__}")
            own.add(section)
            continue
        if found is not None and section == "data":
            raise InputError(f"data {name!r} is no LightningDataModule: name a class that is one")
        if found is not None:
            register_own(name)
            plain = True
        words.append(f"--{section}.name={name}")
    if plain:
        taken, _, _ = own_code.parameters(ImageClassifier)
        words = [_as_argument(word, taken) for word in words]
    return words, own, said


def _sections(path: str) -> dict[str, dict[str, Any]]:
    """What a configuration file says of model and data."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # the parser says why
    content = content if isinstance(content, dict) else {}
    return {part: content[part] for part in ("model", "data") if isinstance(content.get(part), dict)}


def _as_argument(word: str, taken: Sequence[str]) -> str:
    name = word.partition("=")[0].removeprefix("--model.")
    ours = name == word.partition("=")[0] or name.partition(".")[0] in taken
    return word if ours else word.replace("--model.", "--model.arguments.", 1)


def check_resumable(ckpt_path: str, module: LightningModule) -> None:
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
        own_code.find_here()
        words, own, data = translated(sys.argv[1:] if arguments is None else arguments)
        cli = TrainCLI(
            own,
            data or "model" not in own,
            run=False,
            args=words,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"default_config_files": [] if own else [str(DEFAULT_CONFIG)]},
        )
        if cli.start is not None:
            cli.start.fill(cli.model)
        ckpt_path = cli.config["ckpt_path"]
        if ckpt_path:
            check_resumable(ckpt_path, cli.model)
        if cli.datamodule is None and not is_overridden("train_dataloader", cli.model, LightningModule):
            raise InputError(f"model {type(cli.model).__name__!r} has no data of its own: give --data NAME")
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
        except UnpicklingError as error:
            raise InputError(
                f"ckpt_path {ckpt_path!r} holds objects, and no code in a file is run: train with "
                "save_hyperparameters(ignore=[...]) for them"
            ) from error
        best = cli.trainer.checkpoint_callback and cli.trainer.checkpoint_callback.best_model_path
        if not best:
            return
        say = rank_zero_only(print)
        tested = is_overridden("test_step", cli.model, LightningModule)
        kind, holder = (LightningModule, cli.model) if cli.datamodule is None else (LightningDataModule, cli.datamodule)
        if not tested or not is_overridden("test_dataloader", holder, kind):
            say(f"best checkpoint {best}")
            return
        metrics = cli.trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False, weights_only=not own)[0]
        if "model" in own:
            say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()) + f" ({best})")
        else:
            say(f"test accuracy {100 * metrics['test/accuracy']:.2f} % ({best})")
