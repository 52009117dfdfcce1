"""Where a trained network comes from: a training run, a file from anywhere, or torchvision."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from nm_lightning.compression.files.checkpoint import load_weights, read, sha256
from nm_lightning.compression.files.inert import Inert
from nm_lightning.data import ImageData, build_data
from nm_lightning.errors import InputError
from nm_lightning.modules import ImageClassifier
from nm_lightning.reporting.lineage import known_runs

RUNS = Path("runs")
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"  # the repository's own, by name
WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")  # as timm: averages first
PREFIXES = ("module.", "model.")  # of DataParallel, and of a network in a LightningModule


@dataclass
class Source:
    """A trained network and the data it was trained for.

    Attributes:
        module: the network in its LightningModule.
        data: its data module.
        origin: where the weights come from, for people.
        path: of the checkpoint, if there is one.
        runs: of the trainings that made it, see `lineage`.
    """

    module: ImageClassifier
    data: ImageData
    origin: str
    path: Path | None = None
    runs: list[dict[str, str]] = field(default_factory=list)


def open_source(
    checkpoint: str | None, model: str | None, data: str | None, data_dir: str | None, weights: str | None, seed: int
) -> Source:
    """Find the network and its data from what the command line says and the checkpoint knows.

    Args:
        checkpoint: a Lightning checkpoint, a file with one of `WEIGHTS` or a bare state dict, or the name of one in
            `CHECKPOINTS`; None for the newest `best.ckpt` of a training run that fits `model` and `data`.
        model: a registered model's name, where the checkpoint does not say.
        data: a registered data set's name, where the checkpoint does not say.
        data_dir: where the images are; None for the checkpoint's folder, or `data`.
        weights: torchvision's pretrained weights instead of a checkpoint.
        seed: of random weights, where there is neither checkpoint nor pretrained weights.

    Raises:
        InputError: nothing fits, or something is missing.
    """
    if weights and not (model or "").startswith("torchvision/"):
        raise InputError(f"weights {weights!r} are torchvision's: give --model torchvision/<name> with them")
    path = located(checkpoint) if checkpoint else None
    found = (path, read(path)) if path else None
    if found is None and weights is None:
        found = _newest_run(model, data)
    path, content = found or (None, {})
    known, settings = (
        known_settings(content, "hyper_parameters"),
        known_settings(content, "datamodule_hyper_parameters"),
    )
    name, data = model or known.get("name"), data or settings.get("name")
    if found is None and name is None:
        raise InputError(f"no training run under {RUNS}/: run train.py first, or give --checkpoint PATH")
    for flag, value in (("--model", name), ("--data", data)):
        if value is None:
            raise InputError(f"checkpoint {str(path)!r} does not say its {flag[2:]}: give {flag} NAME")
    if found is None and not name.startswith("torchvision/"):
        raise InputError(f"no training run of {name} on {data} under {RUNS}/: train it, or give --checkpoint PATH")

    if data != settings.get("name"):
        settings = {}
    if weights:
        settings = {**settings, "transforms_of": f"{name}:{weights}"}
    images = build_data(**{**settings, "name": data, "data_dir": data_dir or settings.get("data_dir", "data")})
    images.prepare_data()
    images.setup("test")

    if known.get("name") == name:
        module = ImageClassifier(**{**known, "weights": None})
        for label, shape in (("input_shape", images.input_shape), ("num_classes", images.num_classes)):
            trained = module.hparams[label]
            if trained != shape:
                raise InputError(f"checkpoint {str(path)!r} was trained for {label} {trained}, {data} has {shape}")
        module.on_load_checkpoint(content)
        load_weights(module, content["state_dict"], path)
        return Source(module, images, str(path), path, known_runs(content))
    torch.manual_seed(seed)
    module = ImageClassifier(name, images.num_classes, images.input_shape, weights=weights)
    if path is None:
        return Source(module, images, f"torchvision's {weights}" if weights else "random weights")
    load_weights(module.model, _state_dict(content, path, module.model.state_dict()), path)
    return Source(module, images, str(path), path)


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
        name = known_settings(content, "hyper_parameters").get("name")
        trained_on = known_settings(content, "datamodule_hyper_parameters").get("name")
        if model in (None, name) and data in (None, trained_on):
            return path, content
    return None


def _runs() -> Iterator[Path]:
    """Training runs' best checkpoints, the newest first."""
    yield from sorted(RUNS.glob("*/best.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)


def _state_dict(content: dict[str, Any], path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """The bare weights of our architecture, without the prefixes that wrappers leave; 16-bit weights become 32-bit.

    Args:
        content: of the file: a state dict, or one under a name of `WEIGHTS`.
        path: of the file.
        wanted: the names of the architecture's tensors.
    """
    state = next((content[name] for name in WEIGHTS if isinstance(content.get(name), (dict, Inert))), content)
    if isinstance(state, Inert) or (state is content and any(isinstance(value, Inert) for value in content.values())):
        raise InputError(f"checkpoint {str(path)!r} holds whole objects, not weights: save the model's state_dict()")
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"checkpoint {str(path)!r} holds no state dict of tensors")
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if "n_averaged" not in wanted:
        state.pop("n_averaged", None)  # of torch's AveragedModel
    prefix = True
    while prefix and not state.keys() & set(wanted):
        prefix = next((start for start in PREFIXES if all(key.startswith(start) for key in state)), None)
        state = {key.removeprefix(prefix or ""): value for key, value in state.items()}
    return state


def known_settings(content: dict[str, Any], entry: str) -> dict[str, Any]:
    """The hyper-parameters that a checkpoint has under a name; none where they are no plain dictionary."""
    found = content.get(entry)
    return found if isinstance(found, dict) else {}
