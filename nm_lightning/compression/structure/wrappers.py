"""Wrappers around networks and around their parts: what only runs another module is taken as that one."""

import inspect

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from nm_lightning.compression.structure.parts import modules_of

WRAPPERS = (DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module, kinds: tuple[type, ...] = (*WRAPPERS, AveragedModel)) -> nn.Module:
    """The network inside `DistributedDataParallel`, `DataParallel`, `AveragedModel` and `torch.compile`."""
    while True:
        if isinstance(model, kinds):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def unwrap_inside(model: nn.Module) -> None:
    """Take the wrappers around a network's parts off, in place; a part's own compiled code too.

    A moving average within stays one: it has work to do.
    """
    for module in modules_of(model):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrapped(child, WRAPPERS)
    for module in modules_of(model):
        module._compiled_call_impl = None
        forward = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
        if inspect.ismethod(forward):  # compiled: the code belongs to the module that was copied
            module.forward = forward.__func__.__get__(module)
