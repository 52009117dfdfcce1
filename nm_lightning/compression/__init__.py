"""Compression as a library: knows torch, not Lightning; for any network whose code shapes and settings decide."""

from nm_lightning.compression.compress import CompressionResult, Compressor, compress
from nm_lightning.compression.files.checkpoint import load, save
from nm_lightning.compression.files.export import export
from nm_lightning.compression.graph import rule, trace
from nm_lightning.compression.methods import Fold, Merge, Prune, Reconstruct
from nm_lightning.compression.recipe import Recipe
from nm_lightning.compression.refine import Distill, RecalibrateNorm, Refit
from nm_lightning.compression.report import Report, SiteReport
from nm_lightning.compression.selection import (
    Auto,
    GeometricMedian,
    L1Norm,
    L2Norm,
    Latency,
    Macs,
    OutputAware,
    Parameters,
    Ratio,
    Widths,
)
from nm_lightning.compression.settings import Budget, Criterion, Method, Refinement
from nm_lightning.compression.structure.cost import Cost, cost
from nm_lightning.compression.structure.plan import apply_plan
from nm_lightning.compression.structure.sites import Site, Trace

__all__ = [
    "Auto",
    "Budget",
    "CompressionResult",
    "Compressor",
    "Cost",
    "Criterion",
    "Distill",
    "Fold",
    "GeometricMedian",
    "L1Norm",
    "L2Norm",
    "Latency",
    "Macs",
    "Merge",
    "Method",
    "OutputAware",
    "Parameters",
    "Prune",
    "Ratio",
    "RecalibrateNorm",
    "Recipe",
    "Reconstruct",
    "Refinement",
    "Refit",
    "Report",
    "Site",
    "SiteReport",
    "Trace",
    "Widths",
    "apply_plan",
    "compress",
    "cost",
    "export",
    "load",
    "rule",
    "save",
    "trace",
]
