"""Tensors that took long to make, kept for the next time."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def folder() -> Path:
    """Where they are: `nm_lightning` in the user's folder for caches (`XDG_CACHE_HOME`); it can go at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nm_lightning"


def stored(key: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor that is kept by a key; else a new one, kept from now on where the folder can be written."""
    path = folder() / f"{key}.pt"
    with suppress(Exception):  # not there, or not whole
        return torch.load(path, weights_only=True)
    made, partial = make(), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            torch.save(made, file)
        partial.replace(path)
    except OSError:  # a full or a read-only disk: the next time makes it again
        if partial is not None:
            partial.unlink(missing_ok=True)
    return made
