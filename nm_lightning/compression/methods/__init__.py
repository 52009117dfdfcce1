"""What becomes of the removed neurons: one file a method, its settings and its code together."""

# ruff: noqa: I001 - in the order in which they are listed to people
from nm_lightning.compression.methods.prune import Prune
from nm_lightning.compression.methods.merge import Merge
from nm_lightning.compression.methods.fold import Fold
from nm_lightning.compression.methods.reconstruct import Reconstruct

__all__ = ["Fold", "Merge", "Prune", "Reconstruct"]
