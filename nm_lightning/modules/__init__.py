"""LightningModules around the networks: loss, metrics, optimiser, schedule, and what a checkpoint remembers."""

from nm_lightning.measure import evaluate
from nm_lightning.modules.classifier import ImageClassifier
from nm_lightning.modules.compressible import Compressible, arguments_of

__all__ = ["Compressible", "ImageClassifier", "arguments_of", "evaluate"]
