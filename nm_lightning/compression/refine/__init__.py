"""What follows a method: layers fitted together, norms, distillation. None of it needs labels."""

from nm_lightning.compression.refine.distill import Distill
from nm_lightning.compression.refine.norms import RecalibrateNorm
from nm_lightning.compression.refine.refit import Refit

__all__ = ["Distill", "RecalibrateNorm", "Refit"]
