"""NM-Lightning: train image classifiers, then make them smaller without retraining."""

import importlib
from typing import TYPE_CHECKING, Any

from nm_lightning.errors import InputError

if TYPE_CHECKING:
    from nm_lightning.compression import (
        CompressionResult,
        Compressor,
        Recipe,
        apply_plan,
        compress,
        export,
        load,
        rule,
        save,
        trace,
    )

__all__ = [
    "CompressionResult",
    "Compressor",
    "InputError",
    "Recipe",
    "apply_plan",
    "compress",
    "export",
    "load",
    "rule",
    "save",
    "trace",
]


def __getattr__(name: str) -> Any:
    """What `nm_lightning.compression` has under the names above, imported once it is asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("nm_lightning.compression"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
