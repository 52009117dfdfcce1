"""LightningModules around the networks: loss, metrics, optimiser, schedule, and what a checkpoint remembers."""

from nm_lightning.modules.classifier import ImageClassifier
from nm_lightning.modules.compressible import Compressible
from nm_lightning.modules.evaluate import evaluate

__all__ = ["Compressible", "ImageClassifier", "evaluate"]
