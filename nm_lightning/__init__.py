"""NM-Lightning: train image classifiers, then make them smaller without retraining."""

from nm_lightning.compression import CompressionResult, apply_plan, compress, export, load, save, trace
from nm_lightning.errors import InputError

__all__ = ["CompressionResult", "InputError", "apply_plan", "compress", "export", "load", "save", "trace"]
