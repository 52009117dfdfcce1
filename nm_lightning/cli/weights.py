"""Weights from files of every form, into the network that they are of."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from nm_lightning.compression.files.checkpoint import PLAN_KEY, load_weights
from nm_lightning.compression.files.inert import Inert
from nm_lightning.compression.structure.copies import make_plain
from nm_lightning.compression.structure.plan import apply_plan
from nm_lightning.errors import InputError, first_line

WEIGHTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")  # as timm: averages first
PREFIXES = ("module.", "model.")  # of DataParallel, and of a network in a LightningModule


def fill(network: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Narrow a network if its checkpoint is of a compressed one, and load the weights."""
    plan = content.get(PLAN_KEY, {})
    if isinstance(network, LightningModule):
        try:
            network.configure_model()
            network.on_load_checkpoint(content)
        except InputError:
            raise
        except Exception as error:  # whatever the user's hooks raise
            raise InputError(f"checkpoint {str(path)!r}: the module refuses it: {first_line(error)}") from error
    if plan and plan != getattr(network, "compression_plan", {}):
        make_plain(network)
        apply_plan(network, plan)
    state = bare(content, path, network.state_dict())
    if getattr(network, "strict_loading", True):
        load_weights(network, state, path)
    else:
        network.load_state_dict(state, strict=False)


def bare(content: dict[str, Any], path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """The bare weights of our architecture, without the prefixes that wrappers leave; 16-bit weights become 32-bit.

    Args:
        content: of the file: a state dict, or one under a name of `WEIGHTS`.
        path: of the file.
        wanted: the names of the architecture's tensors.
    """
    state = next((content[name] for name in WEIGHTS if isinstance(content.get(name), (dict, Inert))), content)
    if isinstance(state, Inert) or (state is content and any(isinstance(value, Inert) for value in content.values())):
        raise InputError(f"checkpoint {str(path)!r} holds whole objects, not weights: save the model's state_dict()")
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"checkpoint {str(path)!r} holds no state dict of tensors")
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if "n_averaged" not in wanted:
        state.pop("n_averaged", None)  # of torch's AveragedModel
    prefix = True
    while prefix and not state.keys() & set(wanted):
        prefix = next((start for start in PREFIXES if all(key.startswith(start) for key in state)), None)
        state = {key.removeprefix(prefix or ""): value for key, value in state.items()}
    if not state.keys() & set(wanted):  # of a LightningModule that calls its network something else
        for start in dict.fromkeys(key.partition(".")[0] + "." for key in state):
            part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            if part.keys() == set(wanted):
                return part
    return state
