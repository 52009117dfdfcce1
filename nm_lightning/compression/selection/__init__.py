"""Which neurons stay (a criterion), and how many (a budget)."""

from nm_lightning.compression.selection.budgets import Latency, Macs, Parameters, Ratio, Widths
from nm_lightning.compression.selection.criteria import GeometricMedian, L1Norm, L2Norm, WeightCriterion
from nm_lightning.compression.selection.output_aware import Auto, OutputAware

__all__ = [
    "Auto",
    "GeometricMedian",
    "L1Norm",
    "L2Norm",
    "Latency",
    "Macs",
    "OutputAware",
    "Parameters",
    "Ratio",
    "WeightCriterion",
    "Widths",
]
