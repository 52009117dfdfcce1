"""Where a trained network comes from: a training run, a file from anywhere, torchvision, or the user's own code."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from nm_lightning import own_code
from nm_lightning.cli.arguments import arguments, hyper_parameters
from nm_lightning.cli.weights import bare, fill
from nm_lightning.compression.files.checkpoint import PLAN_KEY, load_weights, read, sha256
from nm_lightning.compression.structure.plan import Plan
from nm_lightning.data import ImageData, build_data
from nm_lightning.errors import InputError, first_line
from nm_lightning.loaders import Loaders, Yardstick
from nm_lightning.models import register_own
from nm_lightning.modules import ImageClassifier, arguments_of
from nm_lightning.reporting.lineage import known_runs

RUNS = Path("runs")
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"  # the repository's own, by name
CPU = torch.device("cpu")


@dataclass
class Asked:
    """What the command line says of the network and its data.

    Attributes:
        checkpoint: a Lightning checkpoint, a file with one of `WEIGHTS` or a bare state dict, or the name of one in
            `CHECKPOINTS`; None for the newest `best.ckpt` of a training run that fits `model` and `data`.
        model: a registered model's name, where the checkpoint does not say; or of the user's own, see `own_code`.
        data: a registered data set's name, where the checkpoint does not say; or of a LightningDataModule.
        data_dir: where the images are; None for the checkpoint's folder, or `data`.
        weights: torchvision's pretrained weights instead of a checkpoint.
        seed: of random weights, where there is neither checkpoint nor pretrained weights.
        arguments: for `model` and for `data`, words by name.
        keys: of images and labels in a batch.
    """

    checkpoint: str | None = None
    model: str | None = None
    data: str | None = None
    data_dir: str | None = None
    weights: str | None = None
    seed: int = 0
    arguments: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"model": {}, "data": {}})
    keys: tuple[Any, Any] = (None, None)


@dataclass
class Source:
    """A trained network and the data it was trained for.

    Attributes:
        network: that is compressed.
        name: of it.
        data_name: of its data.
        loaders: of its data.
        example: an input.
        by: what it is measured by.
        origin: where the weights come from, for people.
        path: of the checkpoint, if there is one.
        prefix: of the network's weights in its checkpoints, where it is a part of a LightningModule.
        plan: of what was cut before.
        known: what its checkpoints hold beside weights and plan.
        notes: what a reader should know.
        runs: of the trainings that made it, see `lineage`.
    """

    network: nn.Module
    name: str
    data_name: str
    loaders: Loaders
    example: Tensor
    by: Yardstick
    origin: str
    path: Path | None = None
    prefix: str = ""
    plan: Plan = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runs: list[dict[str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name} on {self.data_name}"


def open_source(asked: Asked) -> Source:
    """Find the network and its data from what the command line says and the checkpoint knows.

    Raises:
        InputError: nothing fits, or something is missing.
    """
    model, data, weights = asked.model, asked.data, asked.weights
    if weights and not (model or "").startswith("torchvision/"):
        raise InputError(f"weights {weights!r} are torchvision's: give --model torchvision/<name> with them")
    path = located(asked.checkpoint) if asked.checkpoint else None
    found = (path, read(path)) if path else None
    if found is None and weights is None:
        found = _newest_run(model, data)
    path, content = found or (None, {})
    known, settings = hyper_parameters(content), hyper_parameters(content, "datamodule_hyper_parameters")
    name, data = model or known.get("name"), data or settings.get("name")
    if asked.model is None and own_code.is_own(name):
        raise InputError(f"checkpoint {str(path)!r} is of {name}, code that is not ours: give --model {name}")
    own = own_code.is_own(name) and known.get("name") != name  # else it is an ImageClassifier's
    if found is None and name is None:
        raise InputError(f"no training run under {RUNS}/: run train.py first, or give --checkpoint PATH")
    for flag, value in (("--model", name), ("--data", data or own)):
        if not value:
            raise InputError(f"checkpoint {str(path)!r} does not say its {flag[2:]}: give {flag} NAME, or module:Class")
    if found is None and not own and not name.startswith("torchvision/"):
        raise InputError(f"no training run of {name} on {data} under {RUNS}/: train it, or give --checkpoint PATH")
    if own_code.is_own(name) and not own:
        register_own(name)
    if own:
        return _own_network(asked, name, data, path, content)
    images = _data(asked, data, settings, path, f"{name}:{weights}" if weights else None)

    if known.get("name") == name:
        hparams = {**known, "weights": None} | _classifiers(name, asked.arguments["model"], known.get("arguments"))
        module = own_code.construct(ImageClassifier, hparams, name)
        for label in ("input_shape", "num_classes") if isinstance(images, ImageData) else ():
            trained, shape = module.hparams[label], getattr(images, label)
            if trained != shape:
                raise InputError(f"checkpoint {str(path)!r} was trained for {label} {trained}, {data} has {shape}")
        module.on_load_checkpoint(content)
        load_weights(module, content["state_dict"], path)
        return _ours(asked, module, images, data, str(path), path, known_runs(content))
    torch.manual_seed(asked.seed)
    hparams = {"name": name, "weights": weights} | own_code.values(ImageClassifier, asked.arguments["model"])
    for label in ("input_shape", "num_classes"):
        if label not in hparams and not hasattr(images, label):
            raise InputError(f"data {data!r} does not say its {label}: give --model.{label}")
        hparams.setdefault(label, getattr(images, label, None))
    module = own_code.construct(ImageClassifier, hparams, name)
    if path is None:
        return _ours(asked, module, images, data, f"torchvision's {weights}" if weights else "random weights")
    load_weights(module.model, bare(content, path, module.model.state_dict()), path)
    return _ours(asked, module, images, data, str(path), path)


def _classifiers(name: str, words: Mapping[str, str], known: dict[str, Any] | None) -> dict[str, Any]:
    """The words as arguments of `ImageClassifier`, those that it does not know as its own network's."""
    taken, _, _ = own_code.parameters(ImageClassifier)
    given = own_code.values(ImageClassifier, {label: word for label, word in words.items() if label in taken})
    others = {label: word for label, word in words.items() if label not in taken}
    if others and own_code.is_own(name):
        given["arguments"] = (known or {}) | own_code.values(own_code.find(name), others)
        return given
    return given | others


def _ours(
    asked: Asked,
    module: ImageClassifier,
    images: LightningDataModule,
    data: str,
    origin: str,
    path: Path | None = None,
    runs: Sequence[dict[str, str]] = (),
) -> Source:
    """The network in our own LightningModule."""
    loaders = Loaders(module, images, CPU, keys=asked.keys)
    name = module.hparams.name
    if isinstance(images, ImageData):
        by = Yardstick(images.test_dataloader(), "", None, True)
    else:
        by = _yardstick(loaders, module.model, name, data)
    known, notes = arguments_of(module, images)
    plan = module.compression_plan
    return Source(
        module.model, name, data, loaders, module.example_input, by, origin, path, "model", plan, known, notes, [*runs]
    )


def _own_network(asked: Asked, name: str, data: str | None, path: Path | None, content: dict[str, Any]) -> Source:
    """A network that the user's code builds: a LightningModule, or a plain one."""
    build = own_code.find(name)
    lightning = isinstance(build, type) and issubclass(build, LightningModule)
    if path is None and lightning:
        raise InputError(f"no training run of {name} under {RUNS}/: give --checkpoint PATH")
    words, known = asked.arguments["model"], hyper_parameters(content)
    given = arguments(build, "model", words, known, path, content.get("hparams_name"))
    torch.manual_seed(asked.seed)
    network = own_code.construct(build, given, name)
    if not isinstance(network, nn.Module):
        raise InputError(f"model {name!r} builds a {type(network).__name__}, not an nn.Module")
    if path is not None:
        fill(network, content, path)
    network.eval()

    images, plan = None, content.get(PLAN_KEY, {})
    if data is not None:
        images = _data(asked, data, hyper_parameters(content, "datamodule_hyper_parameters"), path)
    elif not is_overridden("train_dataloader", network, LightningModule) if lightning else True:
        raise InputError(f"model {name!r} has no data of its own: give --data NAME")
    loaders = Loaders(network, images, CPU, keys=asked.keys)
    data = data or f"{name}'s own data"
    by = _yardstick(loaders, network, name, data)
    known, notes = arguments_of(network, images) if isinstance(network, LightningModule) else ({}, [])
    if not known.get("hyper_parameters"):
        more, left_out = arguments_of(SimpleNamespace(hparams=given))
        known |= more
        notes += left_out
    origin = f"what {name} builds" if path is None else str(path)
    example = loaders.example(network, by.batch)
    runs = known_runs(content)
    return Source(network, name, data, loaders, example, by, origin, path, "", plan, known, notes, runs)


def _data(
    asked: Asked, name: str, known: dict[str, Any], path: Path | None, transforms_of: str | None = None
) -> LightningDataModule:
    """The data module, ours or the user's, ready for its loaders to be asked for."""
    if not own_code.is_own(name):
        given = known if name == known.get("name") else {}
        given = given | ({"transforms_of": transforms_of} if transforms_of else {})
        given |= {"name": name, "data_dir": asked.data_dir or given.get("data_dir", "data")}
        images = own_code.construct(
            build_data, given | own_code.values(build_data, asked.arguments["data"]), name, "data"
        )
        images.prepare_data()
        images.setup("test")
        return images
    build = own_code.find(name, "data")
    words = {"data_dir": asked.data_dir} if asked.data_dir is not None else {}
    given = arguments(build, "data", words | asked.arguments["data"], known, path)
    images = own_code.construct(build, given, name, "data")
    if not isinstance(images, LightningDataModule):
        raise InputError(f"data {name!r} builds a {type(images).__name__}, not a LightningDataModule")
    try:
        images.prepare_data()
        images.setup("fit")
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"data {name!r} can't be set up: {type(error).__name__}: {first_line(error)}") from error
    return images


def _yardstick(loaders: Loaders, network: nn.Module, name: str, data: str) -> Yardstick:
    """What to measure by, after a first batch went through the network."""
    try:
        return loaders.yardstick(network)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{name} can't read a batch of {data}: {type(error).__name__}: {first_line(error)}") from error


def located(checkpoint: str) -> Path:
    """The file of a checkpoint: a path, or the name of one in `CHECKPOINTS`.

    Raises:
        InputError: a file of that name is not the one that was recorded.
    """
    path, index = Path(checkpoint), CHECKPOINTS / "index.yaml"
    known = yaml.safe_load(index.read_text()) if index.is_file() else {}
    if path.exists() or path.suffix or len(path.parts) > 1 or not known:
        return path
    if checkpoint not in known:
        raise InputError(f"checkpoint {checkpoint!r} does not exist: give a file, or one of {', '.join(known)}")
    own = CHECKPOINTS / f"{checkpoint}.ckpt"
    if sha256(own) != known[checkpoint]["sha256"]:
        raise InputError(f"checkpoint {str(own)!r} is missing or not as recorded: its SHA-256 is another")
    return own


def _newest_run(model: str | None, data: str | None) -> tuple[Path, dict[str, Any]] | None:
    for path in _runs():
        content = read(path)
        name = hyper_parameters(content).get("name")
        trained_on = hyper_parameters(content, "datamodule_hyper_parameters").get("name")
        own = hyper_parameters(content).get("_class_path")  # as train.py has noted it
        if own_code.is_own(model) and own is not None and own == model.replace(":", "."):
            return path, content
        if model in (None, name) and (data in (None, trained_on) or own_code.is_own(data)):
            return path, content
    return None


def _runs() -> Iterator[Path]:
    """Training runs' best checkpoints, the newest first."""
    yield from sorted(RUNS.glob("*/best.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
