"""`NeuronMergeCallback`, under the name that configurations use; the code is `nm_lightning/callbacks.py`."""

from nm_lightning.callbacks import NeuronMergeCallback

__all__ = ["NeuronMergeCallback"]
