"""BatchNorms that see on made images what they saw on the training data, and the way back.

A norm's output has the moments that its weight and bias say only where its input has those that it remembers. Made
images come near them, and what they lack grows from layer to layer. Where a network's norms remember the made images'
moments instead, each behind those before it, all their outputs are as on the training data, in mean and variance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.runs import Run, recorded, used_again
from nm_lightning.compression.structure.copies import duplicate, evaluated, with_data
from nm_lightning.compression.structure.inputs import Inputs
from nm_lightning.compression.structure.operations import BATCH_NORMS
from nm_lightning.compression.structure.plan import Plan, named_tensors, replace_tensors, sliced


@torch.no_grad()
def adapted(model: nn.Module, batches: Sequence[Inputs], ranks: Ranks = ALONE) -> nn.Module:
    """A copy whose BatchNorms remember the mean and the variance of what they read from all ranks' images.

    It shares all other tensors with the model. Norms that are called several times stay as they are.
    """
    own = with_data(evaluated(model))
    graph, batches = recorded(own, batches)
    run, again, found = Run(own, graph, batches), used_again(graph, own), {}
    images = ranks.images(batches)
    for node in list(graph.nodes):
        norm = own.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, BATCH_NORMS) or norm.running_var is None or node.target in again:
            continue
        values = (env[node.all_input_nodes[0]] for env in run.states(node))
        parts = [len(each) * moments(each, norm.running_mean).double() for each in values]
        (total,) = ranks.total(torch.stack(parts).sum(0))
        shift, square = total / images
        norm.running_mean += shift
        norm.running_var.copy_(square - shift.square())
        found |= {f"{node.target}.{name}": buffer for name, buffer in norm.named_buffers() if buffer.ndim}
    result, tensors = duplicate(model), named_tensors(model)
    replace_tensors(result, {name: value.to(tensors[name].dtype) for name, value in found.items()})
    return result


@torch.no_grad()
def given_back(narrow: nn.Module, plan: Plan, original: nn.Module, adapted: nn.Module) -> dict[str, Tensor]:
    """What a narrow network's BatchNorms remember, by name: the original's, with what happened to the adapted one's.

    A constant that was put into a mean is added to the original's; a variance changes by the same factor.

    Args:
        narrow: made of the adapted network.
        plan: how.
        original: as wide as the adapted network.
        adapted: see above.
    """
    before, after, found = named_tensors(original), named_tensors(adapted), named_tensors(narrow)
    values = {}
    for path, norm in narrow.named_modules():
        if isinstance(norm, BATCH_NORMS) and norm.running_var is not None:
            mean, variance = (f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var"))
            values[mean] = sliced(mean, before[mean], plan) + (found[mean] - sliced(mean, after[mean], plan))
            start, end = sliced(variance, after[variance], plan), found[variance]
            values[variance] = sliced(variance, before[variance], plan) * torch.where(end == start, 1.0, end / start)
    return values


def moments(values: Tensor, around: Tensor) -> Tensor:
    """The mean and the mean square of what a norm reads `(N, C, ...)`, less `around` `(C,)`; `(2, C)`."""
    variance, mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
    shift = mean - around
    return torch.stack([shift, variance + shift.square()])
