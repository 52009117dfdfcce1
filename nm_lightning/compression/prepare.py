"""Before the first room: a network without wrappers, its weights plain tensors."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

REMOVE = {"WeightNorm": nn.utils.remove_weight_norm, "SpectralNorm": nn.utils.remove_spectral_norm}  # hooks of old


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `DistributedDataParallel`, `DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def plain(model: nn.Module) -> list[str]:
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
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                tensor = hook._tensor_name
                prune.remove(module, tensor)
                notes.append(f"{name}.{tensor}: its pruning mask was made plain")
            elif (kind := type(hook).__name__) in REMOVE:
                REMOVE[kind](module, hook.name)
                notes.append(f"{name}.{hook.name}: its {kind} was made plain")
    return notes
