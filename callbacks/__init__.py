"""Lightning callbacks: compression at the end of training."""

from callbacks.neuron_merge import NeuronMergeCallback

__all__ = ["NeuronMergeCallback"]
