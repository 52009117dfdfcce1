"""Fourth room: the only code that changes a network.

`absorb` computes a consumer's new weight, `fold` puts it in place and slices every layer to the survivors, and the
plan it returns repeats the slicing on any network of the same, wide architecture.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nm_lightning.compression.trace import BATCH_NORMS, CONVOLUTIONS, Member
from nm_lightning.errors import InputError

# layer name -> {"rows" | "columns": the positions that stay}; plain lists, so that a checkpoint can hold it
Plan = dict[str, dict[str, list[int]]]


def absorb(weight: Tensor, positions: Tensor, scaling: Tensor) -> Tensor:
    """A consumer's weight on the kept neurons: `W_next <- W_next Z` (Kim et al. 2020, algorithm 1).

    Args:
        weight: `(out, columns, ...)`.
        positions: `(n, s)`, the columns that each neuron owns.
        scaling: `Z`, `(n, k)`.

    Returns:
        `(out, k, s, ...)` in the weight's dtype, computed in float32 or wider.

    >>> absorb(torch.tensor([[1.0, 10.0]]), torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.5]]))
    tensor([[[6.]]])
    """
    columns = weight[:, positions]
    wide = torch.promote_types(weight.dtype, scaling.dtype)
    absorbed = torch.tensordot(columns.to(wide), scaling.to(wide), dims=([1], [0]))
    return absorbed.movedim(-1, 1).to(weight.dtype)


def put(weight: Tensor, positions: Tensor, keep: Tensor, block: Tensor) -> None:
    """Write the kept neurons' new columns `block` `(out, k, s, ...)` in place, at the positions they own."""
    weight[:, positions[keep].flatten()] = block.flatten(1, 2)


def plan_site(plan: Plan, producer: Member, passed: list[Member], consumers: list[Member], keep: Tensor) -> None:
    """Add to the plan what one site's survivors `(k,)` mean for each of its layers."""

    def shrink(member: Member, side: str) -> None:
        stays = torch.isin(member.owner, keep) | (member.owner < 0)
        sides = plan.setdefault(member.name, {})
        before = sides.get(side, range(len(stays)))
        sides[side] = [position for position in before if stays[position]]

    for member in (producer, *passed):
        shrink(member, "rows")
    for member in consumers:
        shrink(member, "columns")


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Slice a wide network to the plan's survivors, in place; returns the same network.

    Raises:
        InputError: the network lacks a layer of the plan, or the layer is too narrow for it.
    """
    for name, sides in plan.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"the compressed checkpoint was made from another network: no layer {name!r}") from None
        for side, stays in sides.items():
            _slice(name, layer, side, torch.tensor(stays))
    return model


def compose(first: Plan, second: Plan) -> Plan:
    """The plan that does `first`, then `second` (whose positions count in the already narrowed layers)."""
    composed = {name: dict(sides) for name, sides in first.items()}
    for name, sides in second.items():
        for side, stays in sides.items():
            before = composed.setdefault(name, {}).get(side)
            composed[name][side] = stays if before is None else [before[position] for position in stays]
    return composed


def prefixed(plan: Plan, prefix: str) -> Plan:
    """The plan as a network sees it that holds the planned one under the name `prefix`."""
    return {f"{prefix}.{name}": sides for name, sides in plan.items()}


def _slice(name: str, layer: nn.Module, side: str, stays: Tensor) -> None:
    if isinstance(layer, BATCH_NORMS):
        sliced: Mapping[str, int] = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
        size = "num_features"
    elif side == "rows":
        sliced = {"weight": 0, "bias": 0}
        size = "out_channels" if isinstance(layer, CONVOLUTIONS) else "out_features"
    else:
        sliced = {"weight": 1}
        size = "in_channels" if isinstance(layer, CONVOLUTIONS) else "in_features"
    if int(stays.max()) >= getattr(layer, size):
        raise InputError(
            f"the compressed checkpoint was made from another network: {name} has {size} "
            f"{getattr(layer, size)}, the plan needs more than {int(stays.max())}"
        )
    for attribute, dim in sliced.items():
        value = getattr(layer, attribute)
        if value is None:
            continue
        narrow = value.detach().index_select(dim, stays.to(value.device))
        if isinstance(value, nn.Parameter):
            narrow = nn.Parameter(narrow, requires_grad=value.requires_grad)
        setattr(layer, attribute, narrow)
    setattr(layer, size, len(stays))
