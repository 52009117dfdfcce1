"""NM-Lightning: train image classifiers, then make them smaller without retraining."""

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
from nm_lightning.errors import InputError

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
