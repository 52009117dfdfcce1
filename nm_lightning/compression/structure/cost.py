"""A network's size and work."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from nm_lightning.compression.structure.copies import modes_kept
from nm_lightning.compression.structure.inputs import Inputs, arguments, first


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    Attributes:
        parameters: number of learned values.
        macs: multiply-accumulates for one image, by torch's flop counter.
    """

    parameters: int
    macs: int


def cost(model: nn.Module, example_input: Inputs) -> Cost:
    """Count a network's parameters, and its multiply-accumulates on the first image of `example_input`.

    >>> cost(nn.Linear(4, 2), torch.zeros(1, 4))
    Cost(parameters=10, macs=8)
    """
    from torch.utils.flop_counter import FlopCounterMode  # it brings Triton along

    constants = {name: tensor.detach() for name, tensor in model.named_parameters()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter sees nothing of nn.MultiheadAttention's one operation
    try:
        with modes_kept(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()
            functional_call(
                model, constants, *arguments(first(example_input, 1))
            )  # the counter trips over a parameter that is an input
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
