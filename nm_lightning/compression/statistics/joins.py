"""Where a layer's output joins other streams, and is compared with the original's."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph import operation_name
from nm_lightning.compression.statistics.patches import at_rows
from nm_lightning.compression.statistics.runs import Run
from nm_lightning.compression.structure.operations import BATCH_NORMS, CONVOLUTIONS, facts_of


@dataclass
class Join:
    """Where a layer's output is compared with the original's.

    A value there is an affine function of the layer's output.

    Attributes:
        end: the node.
        scale: `(out,)`, what a unit of the layer's output is there; None for 1.
        shift: `(out,)`, what is added to it on the way; None for nothing.
        others: the streams that are added, and what a unit of each is at the end, like `scale`.
        norm: the name of the BatchNorm directly behind the layer, if it can take a constant.
        limit: the value above which a rectifier cuts what it reads there, infinite for ReLU; None without one.
    """

    end: fx.Node
    scale: Tensor | None
    norm: str | None
    limit: float | None
    shift: Tensor | None = None
    others: list[tuple[fx.Node, Tensor | None]] = field(default_factory=list)

    def value(
        self, output: Tensor, run: Run, shape: torch.Size, rows: Tensor | None, dim: int, channels: Tensor
    ) -> Tensor:
        """The value at the end where the layer gives `output`, both `(rows, k)`.

        Args:
            output: at some positions, and of some channels.
            run: whose present batch has the other streams.
            shape: of the layer's output for the whole batch.
            rows: the positions, see `at_rows`; None for all.
            dim: the channels' dimension.
            channels: `(k,)`.
        """
        value = output if self.scale is None else output * self.scale[channels]
        value = value if self.shift is None else value + self.shift[channels]
        for node, scale in self.others:
            other = torch.as_tensor(run.value(node), device=value.device)
            other = at_rows(other.expand(shape), rows, dim)[:, channels]
            value = value + (other if scale is None else other * scale[channels])
        return value


def find_join(
    call: fx.Node,
    model: nn.Module,
    pending: set[fx.Node],
    shapes: Mapping[fx.Node, torch.Size],
    again: Set[str],
) -> Join:
    """Follow the output of a layer's call through norms and additions, as long as nothing else reads it."""
    node, scale, norm, shift = call, None, None, None
    streams: list[tuple[fx.Node, Tensor | None]] = []
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
            constant = -module.running_mean * own
            constant = constant if module.bias is None else constant + module.bias
            shift = constant if shift is None else shift * own + constant
            scale = own if scale is None else scale * own
            streams = [(other, own if factor is None else factor * own) for other, factor in streams]
        elif operation in ("add", "iadd"):
            others = [source for source in user.all_input_nodes if source is not node]
            if len(others) != 1 or len(user.args) != 2 or user.kwargs or not known(others[0], call, pending):
                break
            streams.append((others[0], None))
        elif not facts_of(operation).idle:
            break
        node = user
    readers = {operation_name(user, model.get_submodule(user.target) if user.op == "call_module" else None)
               for user in node.users}  # fmt: skip
    return Join(node, scale, norm, facts_of(*readers).limit if len(readers) == 1 else None, shift, streams)


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
    return gap if limit == float("inf") else torch.where(target >= limit, (limit - value).clamp(min=0), gap)
