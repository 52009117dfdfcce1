"""What results are compared with: slow or literal, and sharing no code with the library."""

import copy

import torch
from torch import nn


def masked(model: nn.Module, result, sites) -> nn.Module:
    """A copy of the wide network whose consumers read nothing from the neurons that `result` removed."""
    wide = copy.deepcopy(model)
    for site in sites:
        for consumer in site.consumers:
            gone = ~torch.isin(consumer.owner, result.keep[site.name]) & (consumer.owner >= 0)
            name, dim = consumer.slots[0]
            weight = wide.get_parameter(name).data.movedim(dim, 1)
            per = len(gone) // consumer.groups
            for group, part in enumerate(weight.chunk(consumer.groups)):
                part[:, gone[group * per : (group + 1) * per]] = 0
    return wide


def gap(first, second, x):
    """The largest difference of two networks' outputs, as a share of the second's largest."""
    with torch.no_grad():
        return float((first(x) - second(x)).abs().max() / second(x).abs().max())
