"""A compressed network on disk: its weights and the plan that narrows the wide architecture to them."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nm_lightning.compression.compress import CompressionResult
from nm_lightning.compression.files.inert import load_inert
from nm_lightning.compression.files.partial import hold, reason, sweep
from nm_lightning.compression.recipe import Recipe
from nm_lightning.compression.structure.copies import check_module, make_plain
from nm_lightning.compression.structure.plan import Plan, apply_plan
from nm_lightning.errors import InputError

PLAN_KEY, RECIPE_KEY = "compression_plan", "compression_recipe"  # beside `state_dict` in a checkpoint


def save(result: CompressionResult, path: str | Path) -> None:
    """Write a compressed network: its weights and its plan, which `load` puts onto the wide architecture.

    >>> import tempfile
    >>> from nm_lightning import compress
    >>> wide = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(compress(wide, torch.zeros(1, 4), ratio=0.75), f"{folder}/small.pt")
    ...     load(f"{folder}/small.pt", into=wide)[0]
    Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(result, CompressionResult):
        raise InputError(f"save was given a {type(result).__name__}: give what compress returns")
    write(path, result.model.state_dict(), result.plan, result.recipe)


def write(path: str | Path, state_dict: dict[str, Tensor], plan: Plan, recipe: Recipe, **more: Any) -> None:
    """Write a checkpoint; it appears under its name only when complete.

    Args:
        path: the file.
        state_dict: the compressed network's.
        plan: of the compression.
        recipe: of the compression.
        more: further entries of the checkpoint; tensors and plain Python values, so that it loads without pickle.

    Raises:
        InputError: there is no room, or no folder to write to; what was there before is still there.
    """
    path = Path(path)
    version = {"pytorch-lightning_version": "2.6.0"}  # the layout below is that version's
    content = {**more, "state_dict": state_dict, PLAN_KEY: plan, RECIPE_KEY: recipe.to_dict(), **version}
    partial, held = path.with_name(f".{path.name}.{os.getpid()}.partial"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, rf"\.{re.escape(path.name)}\.\d+\.partial")
        partial.touch()
        held = hold(partial)
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch writes in C++, and says so
        raise InputError(
            f"checkpoint {str(path)!r} can't be written ({reason(error)}): make room, or give another folder"
        ) from error
    finally:
        if held is not None:
            os.close(held)
        with suppress(OSError):
            partial.unlink()


def sha256(path: str | Path | None) -> str:
    """A file's hash; empty where there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """Narrow a wide network in place and fill it with the weights of a compressed checkpoint; returns it.

    Args:
        path: a file that `save` or `NeuronMergeCallback` wrote.
        into: the architecture that was compressed, at its original width; parametrised weights are made plain.

    Raises:
        InputError: the file is not such a checkpoint, or belongs to another network.
    """
    check_module(into, "into")
    checkpoint = read(path)
    if PLAN_KEY not in checkpoint:
        raise InputError(f"{path} is not a compressed checkpoint: it holds no plan")
    make_plain(into)  # as the compressed weights are
    apply_plan(into, checkpoint[PLAN_KEY])
    load_weights(into, checkpoint["state_dict"], path)
    return into


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU, whatever device it was saved from.

    No code in it is run: what is neither tensor nor plain data is an `Inert` placeholder.

    Raises:
        InputError: the file is missing, truncated, or is no checkpoint.
    """
    if Path(path).is_dir():
        raise InputError(f"checkpoint {str(path)!r} is a folder: name a file in it")
    if not Path(path).is_file():
        raise InputError(f"checkpoint {str(path)!r} does not exist")
    try:
        content = load_inert(path)
    except InputError:
        raise
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise InputError(f"checkpoint {str(path)!r} is truncated or not a PyTorch checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_weights(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Load a state dict that must fit exactly, see `check_weights`."""
    check_weights(model, state, path)
    model.load_state_dict(state)


def check_weights(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    """Compare a state dict with the one that a network wants.

    Raises:
        InputError: it belongs to another network; names the first tensor that does not fit.
    """
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in state:
            raise InputError(f"checkpoint {str(path)!r} is of another network: it lacks {name}")
        found = state[name]
        if not isinstance(found, torch.Tensor) or found.shape != value.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(
                f"checkpoint {str(path)!r} is of another network: {name} is {shape} there, {tuple(value.shape)} here"
            )
    extra = next((name for name in state if name not in wanted), None)
    if extra is not None:
        raise InputError(f"checkpoint {str(path)!r} is of another network: {extra} has no place here")
