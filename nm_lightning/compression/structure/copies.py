"""Copies of a network: without wrappers, its weights plain tensors, in evaluation mode, or without data."""

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from nm_lightning.compression.structure.computed import make_computed_plain
from nm_lightning.compression.structure.parts import modules_of
from nm_lightning.compression.structure.plan import caches, named_tensors, tensors_of
from nm_lightning.compression.structure.wrappers import unwrap_inside
from nm_lightning.errors import InputError

TORCHS = set(vars(nn.Module()))  # what every module has
COMPILED = "_compiled_call_impl"  # which no copy has
COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__")
ATOMS = {int, float, bool, str, type(None)}  # what is its own copy
REMOVE = {"WeightNorm": nn.utils.remove_weight_norm, "SpectralNorm": nn.utils.remove_spectral_norm}  # hooks of old


def check_module(model: object, label: str = "model") -> None:
    """Raise `InputError` for what is no network, as its class, its path or its weights."""
    if isinstance(model, nn.Module):
        return
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise InputError(f"{label} is {kind}: give the network itself, an nn.Module")


def check_values(model: nn.Module, read: Set[str]) -> None:
    """Raise `InputError` for weights without a value; those that are `read` must be finite, too."""
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in named_tensors(model).items():
        if name not in learned | read or not tensor.is_floating_point():
            continue
        if tensor.is_meta:
            raise InputError(f"{name} has no data, it is on the meta device: load the weights first")
        if tensor.dtype.itemsize < 2:
            raise InputError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}: give float16 or wider")
        ends = torch.stack(tensor.aminmax()) if tensor.numel() else tensor  # nan, if anything is
        if bool((~ends.isfinite() if name in read else ends.isnan()).any()):
            raise InputError(f"{name} holds values that are not finite: has the training diverged?")


def check_network(model: nn.Module) -> None:
    """Raise `InputError` for what is no network, and parts whose weights are no tensors yet, or no longer."""
    check_module(model)
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

    It shares its parameters and buffers with the model, but for parametrised ones, which have memory of their own.
    """
    check_network(model)
    special = any(parametrize.is_parametrized(module) or _hooks(module) for module in modules_of(model))
    narrow = with_data(model) if special else duplicate(model)
    return narrow, make_plain(narrow)


def evaluated(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in at least float32; it shares the model's tensors where their dtype allows."""
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        return with_data(model).float().eval()
    return duplicate(model).eval()


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a network on PyTorch's meta device: shapes without memory; its hooks, which want data, are gone."""

    def hollow(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    result = duplicate(model, hollow).to("meta")
    for module in modules_of(result):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return result


def with_data(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model."""
    return duplicate(model, copy.deepcopy)


def duplicate(model: nn.Module, each: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """A copy that owns its forward: nothing in it runs the model's.

    Tensors that are plain attributes are copied without their history, what can't be copied (a lock) is shared, hooks
    stay, and caches are empty.

    Args:
        model: it is left as it is.
        each: what a parameter or buffer becomes; by default the copy shares it.
    """
    memo: dict[int, Any] = {id(tensor): each(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for cache in caches(model):  # a copy's is empty
        memo[id(cache)] = copy.copy(cache)
        memo[id(cache)].clear()
    modules = modules_of(model)
    held = [value for module in modules for value in _held(module).values()]
    for value in pytree.tree_leaves(held):
        if isinstance(value, Tensor):  # of a weight that a hook computes, or an activation that a forward keeps
            memo.setdefault(id(value), each(value.detach().clone()))
    try:
        result = _deepcopy(model, modules, dict(memo))
    except Exception:  # what a lock raises, or a dictionary whose entries are attributes
        for value in held:
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                memo[id(value)] = value
        result = _deepcopy(model, modules, dict(memo))
    own = modules_of(result)
    twins = dict(zip(map(id, modules), own, strict=True))
    for module in own:
        for name, value in _held(module).items():
            if inspect.isroutine(value):
                setattr(module, name, _rebound(value, twins))
    unwrap_inside(result)
    return result


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module has beside what every module has; no numbers, flags or names, nor tuples of them."""
    return {name: each for name, each in vars(module).items() if name not in TORCHS and not _atomic(each)}


def _atomic(value: Any) -> bool:
    """Whether a value is its own copy."""
    return type(value) in ATOMS or (type(value) is tuple and ATOMS.issuperset(map(type, value)))


def _deepcopy(model: nn.Module, modules: list[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy`; modules that leave their copying to Python are filled here, which takes a fifth of the time."""
    ours = {kind: _copied_as_any(kind) for kind in set(map(type, modules))}
    shells = [module for module in modules if ours[type(module)]]
    memo |= {id(module): type(module).__new__(type(module)) for module in shells}
    for module in reversed(shells):  # children first: a class with a way of its own may ask them
        state = {name: _value(name, value, memo) for name, value in vars(module).items() if name != COMPILED}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def _copied_as_any(kind: type) -> bool:
    """Whether a class of modules has nothing of its own to say about copies."""
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in COPYING)


def _value(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a module's attribute."""
    if _atomic(value):
        return value
    if name in TORCHS and not value:  # hooks that it has not
        return type(value)()
    if name in TORCHS and type(value) is dict:
        return {key: each if type(each) in ATOMS else copy.deepcopy(each, memo) for key, each in value.items()}
    return copy.deepcopy(value, memo)


def _rebound(function: Any, twins: Mapping[int, nn.Module]) -> Any:
    """A function that hangs on a copied module, with the copies for the modules that it holds; not compiled."""
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    owner, inner = getattr(function, "__self__", None), getattr(function, "__func__", None)
    if inner is not None:
        return types.MethodType(inner, twins.get(id(owner), owner))
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells]
    if not any(isinstance(value, nn.Module) or inspect.ismethod(value) for value in held):
        return function
    others = [_rebound(value, twins) if inspect.ismethod(value) else twins.get(id(value), value) for value in held]
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        tuple(types.CellType(value) for value in others),
    )  # fmt: skip
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module is in training or evaluation mode afterwards as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def containers_kept(model: nn.Module) -> Iterator[None]:
    """What the modules keep in dictionaries and lists of their own, as a cache of what they computed, is as before."""
    held = [value for module in modules_of(model) for value in _held(module).values()]
    kept = [(value, copy.copy(value)) for value in held if type(value) in (dict, list, set)]
    try:
        yield
    finally:
        for value, before in kept:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def own_tensors(narrow: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Give a network memory of its own for each tensor that is still one of `shared`."""
    foreign = {id(tensor) for tensor in shared.values()}
    copies: dict[int, Tensor] = {}
    for module in modules_of(narrow):
        for home, name, tensor in tensors_of(module):
            if id(tensor) in foreign:
                if id(tensor) not in copies:
                    copies[id(tensor)] = copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()
                home[name] = copies[id(tensor)]


def _hooks(module: nn.Module) -> list:
    """Torch's older masks and norms of weights, which work by hooks."""
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if isinstance(hook, prune.BasePruningMethod) or type(hook).__name__ in REMOVE]


def _forget_loading(module: nn.Module, kind: str) -> None:
    """Take off what splits a loaded weight into an old norm's parts: torch leaves it there."""
    for number, each in list(module._load_state_dict_pre_hooks.items()):
        if type(getattr(each, "hook", each)).__name__ == f"{kind}LoadStateDictPreHook":
            del module._load_state_dict_pre_hooks[number]


def make_plain(model: nn.Module) -> list[str]:
    """Make parametrised weights (weight norm, spectral norm, pruning masks) plain tensors, in place; says which.

    Those that a layer's own forward computes, too.
    """
    notes = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            # a copied module shares its generated class with the original, and removing changes the class
            own = {key: value for key, value in vars(type(module)).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            module.parametrizations.eval()  # in training, a spectral norm takes a step whenever it is asked
            for tensor in list(module.parametrizations):
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                notes.append(f"{name}.{tensor}: its parametrisation was made plain")
        for hook in _hooks(module):
            kind = type(hook).__name__
            if kind in REMOVE:
                REMOVE[kind](module, hook.name)
                _forget_loading(module, kind)
                notes.append(f"{name}.{hook.name}: its {kind} was made plain")
            else:
                prune.remove(module, hook._tensor_name)
                notes.append(f"{name}.{hook._tensor_name}: its pruning mask was made plain")
    return notes + make_computed_plain(model)
