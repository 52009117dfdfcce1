"""A module in the Trainer's hands becomes narrow, and with it all that hangs on it: optimisers, averages, DDP."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from nm_lightning.compression.structure.copies import make_plain
from nm_lightning.compression.structure.decomposition import assign
from nm_lightning.compression.structure.plan import Plan, apply_plan, learned, named_tensors, sliced


def become(module: LightningModule, narrow: LightningModule, plan: Plan) -> None:
    """Make a wide module what its narrow copy is, in place: all that hangs on it stays its own."""
    make_plain(module)
    with torch.no_grad():
        apply_plan(module, plan)
        cut = {name: tensor for name, tensor in named_tensors(narrow).items() if name in plan.get("slices", {})}
        assign(module, learned(narrow) | cut)


def become_in_training(
    trainer: Trainer, module: LightningModule, narrow: LightningModule, plan: Plan, whole_plan: Plan
) -> None:
    """`become` in the middle of a `fit`.

    Optimisers go on with the slices of their state that belong to what stays; schedulers, which know the optimisers
    alone, notice nothing. Averages of `WeightAveraging` are sliced, and moved by as much as the weights were. DDP is
    made anew. What was best among wider networks is forgotten: checkpoints and early stopping begin again.

    Args:
        trainer: in a `fit`, between two steps.
        module: its module.
        narrow: the narrow copy.
        plan: from the one to the other.
        whole_plan: from the architecture that the module's `__init__` builds.
    """
    before = dict(module.named_parameters(remove_duplicate=False))
    moved = _moves(module, narrow, plan)
    become(module, narrow, plan)
    module.compression_plan = whole_plan
    after = dict(module.named_parameters(remove_duplicate=False))
    for optimizer in trainer.optimizers:
        narrow_optimizer(optimizer, before, after, plan)
    for averages in averages_of(trainer):
        narrow_average(averages, moved, plan)
        averages.compression_plan = whole_plan
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy.model is not module:
        trainer.strategy.model = module
        trainer.strategy.configure_ddp()
    forget_best(trainer)


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """The modules that the Trainer's `WeightAveraging` callbacks hold."""
    found = [each._average_model for each in trainer.callbacks if isinstance(each, WeightAveraging)]
    return [each.module for each in found if each is not None]


@torch.no_grad()
def narrow_average(average: nn.Module, moved: Mapping[str, Tensor], plan: Plan) -> None:
    """Slice an average of a module's weights by the module's plan, and move it by what else compression changed."""
    make_plain(average)
    apply_plan(average, plan)
    for name, own in learned(average).items():
        if name in moved:
            own += moved[name].to(own)


def narrow_optimizer(
    optimizer: torch.optim.Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    plan: Plan,
) -> None:
    """Put a narrow network's parameters in the place of the wide one's, with the slices of their state.

    A parameter that compression has made, such as a bias, joins the group that holds vectors alone, or else its
    layer's; state that is shaped otherwise than its parameter begins anew.

    Args:
        optimizer: changed in place; the group's dictionaries stay the same objects.
        before: the wide network's parameters by name.
        after: the narrow one's.
        plan: from the one to the other.
    """
    names = {id(parameter): name for name, parameter in reversed(before.items())}
    state: dict = defaultdict(dict)
    anew = []
    vectors = [all(each.ndim <= 1 for each in group["params"]) for group in optimizer.param_groups]
    homes = {}
    for number, group in enumerate(optimizer.param_groups):
        kept = []
        for old in group["params"]:
            name = names.get(id(old))
            new = after.get(name, old) if name is not None else old  # what is not the module's stays
            kept.append(new)
            homes[name] = number
            if new is old or old not in optimizer.state:
                values = optimizer.state.get(old, {})
            else:
                values = _sliced_state(optimizer.state[old], old, name, plan)
                anew += [name] if optimizer.state[old] and not values else []
            if values:
                state[new] = values
        group["params"] = kept
    order = {id(parameter): place for place, parameter in enumerate(after.values())}
    for name, parameter in after.items():
        weight = f"{name.rpartition('.')[0]}.weight".lstrip(".")
        if name not in before and weight in homes:
            number = next((place for place, only in enumerate(vectors) if only), homes[weight])
            group = optimizer.param_groups[number]
            group["params"] = sorted([*group["params"], parameter], key=lambda each: order.get(id(each), -1))
    optimizer.state = state
    if anew:
        rank_zero_warn(f"{type(optimizer).__name__} begins anew for {', '.join(anew)}: its state is no slice of theirs")


def forget_best(trainer: Trainer) -> None:
    """Let checkpoints and early stopping compare narrow networks with narrow ones."""
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.best_k_models, callback.best_model_path, callback.kth_best_model_path = {}, "", ""
            callback.best_model_score = callback.kth_value = callback.current_score = None
        if isinstance(callback, EarlyStopping):
            worst = torch.tensor(float("inf"))
            callback.best_score = worst if callback.monitor_op == torch.lt else -worst
            callback.wait_count = 0


def _moves(module: nn.Module, narrow: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """What compression changed beside slicing, by the tensor's name; a tensor that it made is all change."""
    wide, moved = learned(module), {}
    for name, value in learned(narrow).items():
        if not value.is_floating_point():
            continue
        old = sliced(name, wide[name].detach(), plan) if name in wide else torch.zeros_like(value)
        if old.shape == value.shape and not torch.equal(old, value.detach().to(old)):
            moved[name] = value.detach().to(old) - old
    return moved


def _sliced_state(values: Mapping, old: Tensor, name: str, plan: Plan) -> dict:
    """A parameter's state, sliced like it; empty where some of it is shaped otherwise."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Tensor) and value.shape == old.shape and value.ndim:
            found[key] = sliced(name, value, plan)
        elif isinstance(value, Tensor) and value.numel() > 1:
            return {}
        else:
            found[key] = value
    return found
