"""Copies of a network: without wrappers, its weights plain tensors, in evaluation mode, or without data."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from nm_lightning.compression.structure.plan import named_tensors, tensors_of
from nm_lightning.compression.structure.wrappers import unwrap_inside, unwrapped  # noqa: F401
from nm_lightning.errors import InputError

REMOVE = {"WeightNorm": nn.utils.remove_weight_norm, "SpectralNorm": nn.utils.remove_spectral_norm}  # hooks of old


def check_network(model: nn.Module) -> None:
    """Raise `InputError` for parts whose weights are no tensors yet, or no longer."""
    for name, module in model.named_modules():
        home, label = type(module).__module__, f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{label} is a TorchScript module: give the module that it was made from")
        if any(isinstance(own, nn.parameter.UninitializedTensorMixin) for own in module.parameters(recurse=False)):
            raise InputError(f"{label} is a lazy layer without weights yet: run the network once")
        if home.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise InputError(f"{label} is quantised: compress the network first, then quantise it")


def plain_copy(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy whose weights are plain tensors, and what was made plain for that.

    It shares its tensors with the model, but for parametrised ones, which are made plain in memory of their own.
    """
    check_network(model)
    special = any(parametrize.is_parametrized(module) or _hooks(module) for module in model.modules())
    narrow = copy.deepcopy(model) if special else _sharing(model)
    unwrap_inside(narrow)
    return narrow, _make_plain(narrow)


def evaluated(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in at least float32; it shares the model's tensors where their dtype allows."""
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        return copy.deepcopy(model).float().eval()
    return _sharing(model).eval()


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a network on PyTorch's meta device: shapes without memory."""
    memo = {}
    for tensor in named_tensors(model).values():
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    hollow = copy.deepcopy(model, memo).to("meta")
    unwrap_inside(hollow)
    return hollow


def with_data(model: nn.Module) -> nn.Module:
    """A copy with memory of its own, also of tensors that depend on others."""
    memo = {}
    for tensor in named_tensors(model).values():
        twin = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    copied = copy.deepcopy(model, memo)
    unwrap_inside(copied)
    return copied


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module is in training or evaluation mode afterwards as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def own_tensors(narrow: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Give a network memory of its own for each tensor that is still one of `shared`."""
    foreign = {id(tensor) for tensor in shared.values()}
    copies: dict[int, Tensor] = {}
    for module in narrow.modules():
        for home, name, tensor in tensors_of(module):
            if id(tensor) in foreign:
                if id(tensor) not in copies:
                    copies[id(tensor)] = copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()
                home[name] = copies[id(tensor)]


def _sharing(model: nn.Module) -> nn.Module:
    """A copy that shares the model's tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in named_tensors(model).values()})


def _hooks(module: nn.Module) -> list:
    """Torch's older masks and norms of weights, which work by hooks."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) or type(hook).__name__ in REMOVE]


def _make_plain(model: nn.Module) -> list[str]:
    """Make parametrised weights (weight norm, spectral norm, pruning masks) plain tensors, in place; says which."""
    notes = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            # a copied module shares its generated class with the original, and removing changes the class
            own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            for tensor in list(module.parametrizations):
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                notes.append(f"{name}.{tensor}: its parametrisation was made plain")
        for hook in _hooks(module):
            kind = type(hook).__name__
            if kind in REMOVE:
                REMOVE[kind](module, hook.name)
                notes.append(f"{name}.{hook.name}: its {kind} was made plain")
            else:
                prune.remove(module, hook._tensor_name)
                notes.append(f"{name}.{hook._tensor_name}: its pruning mask was made plain")
    return notes
