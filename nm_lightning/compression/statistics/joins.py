"""Where a layer's output joins other streams, and is compared with the original's."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph import operation_name
from nm_lightning.compression.structure.operations import BATCH_NORMS, CONVOLUTIONS, facts_of


@dataclass
class Join:
    """Where a layer's output is compared with the original's.

    Attributes:
        end: the node.
        scale: `(out,)`, what a unit of the layer's output is there; None for 1.
        norm: the name of the BatchNorm directly behind the layer, if it can take a constant.
        limit: the value above which a rectifier cuts what it reads there, infinite for ReLU; None without one.
    """

    end: fx.Node
    scale: Tensor | None
    norm: str | None
    limit: float | None


def find_join(
    call: fx.Node,
    model: nn.Module,
    pending: set[fx.Node],
    shapes: Mapping[fx.Node, torch.Size],
    again: Set[str],
) -> Join:
    """Follow the output of a layer's call through norms and additions, as long as nothing else reads it."""
    node, scale, norm = call, None, None
    by_channel = isinstance(model.get_submodule(call.target), CONVOLUTIONS) or len(shapes[node]) == 2
    while len(node.users) == 1:
        (user,) = node.users
        module = model.get_submodule(user.target) if user.op == "call_module" else None
        operation = operation_name(user, module)
        if shapes.get(user) != shapes[call]:
            break
        if isinstance(module, BATCH_NORMS) and module.running_var is not None and by_channel:
            norm = user.target if node is call and user.target not in again else norm
            own = torch.rsqrt(module.running_var + module.eps)
            own = own if module.weight is None else own * module.weight
            scale = own if scale is None else scale * own
        elif operation in ("add", "iadd"):
            others = [source for source in user.all_input_nodes if source is not node]
            if len(others) != 1 or len(user.args) != 2 or user.kwargs or not known(others[0], call, pending):
                break
        elif not facts_of(operation).idle:
            break
        node = user
    readers = {operation_name(user, model.get_submodule(user.target) if user.op == "call_module" else None)
               for user in node.users}  # fmt: skip
    return Join(node, scale, norm, facts_of(*readers).limit if len(readers) == 1 else None)


def known(node: fx.Node, task: fx.Node, pending: set[fx.Node]) -> bool:
    """Whether a node's value is final before `task`'s layer is solved."""
    seen, ahead = set(), [node]
    while ahead:
        here = ahead.pop()
        if here is task or here in pending:
            return False
        if here not in seen:
            seen.add(here)
            ahead += here.all_input_nodes
    return True


def rectified_gap(target: Tensor, value: Tensor, limit: float) -> Tensor:
    """What a value lacks of the target behind a rectifier that cuts below zero and above `limit`."""
    gap = torch.where(target <= 0, -value.clamp(min=0), target - value)
    return torch.where(target >= limit, (limit - value).clamp(min=0), gap)
