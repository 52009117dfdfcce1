"""Compression as a library: knows torch, not Lightning, and works on any network that `torch.fx` can trace."""

from nm_lightning.compression.checkpoint import load, save
from nm_lightning.compression.export import export
from nm_lightning.compression.fold import apply_plan
from nm_lightning.compression.pipeline import CompressionResult, compress
from nm_lightning.compression.report import Cost, Report, SiteReport, cost
from nm_lightning.compression.sites import Site, Trace
from nm_lightning.compression.trace import trace

__all__ = [
    "CompressionResult",
    "Cost",
    "Report",
    "Site",
    "SiteReport",
    "Trace",
    "apply_plan",
    "compress",
    "cost",
    "export",
    "load",
    "save",
    "trace",
]
