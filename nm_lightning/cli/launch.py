"""One process or many, by Lightning's Fabric: subprocesses on this machine, torchrun or SLURM on several."""

import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from nm_lightning.cli import errors
from nm_lightning.errors import InputError


def fabric_of(device: str, devices: int = 1, num_nodes: int = 1, strategy: str = "auto") -> Fabric:
    """The Fabric that the flags describe, not yet launched.

    Args:
        device: `cpu`, `cuda`, or one of several, such as `cuda:1`.
        devices: processes on each machine, a device for each.
        num_nodes: machines.
        strategy: Lightning's name of it, such as `ddp`.

    Raises:
        InputError: what is not available here, or not what torchrun has started.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not available here: give --device cpu") from error
    for flag, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            raise InputError(f"{flag} {value}: give a whole number from 1")
    started = int(os.environ.get("WORLD_SIZE", devices * num_nodes))
    if "TORCHELASTIC_RUN_ID" in os.environ and started != devices * num_nodes:
        nodes = max(1, started // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        asked = f"--devices {devices} --num_nodes {num_nodes}"
        raise InputError(
            f"torchrun started {started} processes, not those of {asked}: "
            f"give --devices {started // nodes} --num_nodes {nodes}"
        )
    kind, _, index = device.partition(":")
    if index and devices > 1:
        raise InputError(f"--device {device} is one device: give --device {kind} with --devices {devices}")
    try:
        fabric = Fabric(
            accelerator=kind, devices=[int(index)] if index else devices, num_nodes=num_nodes, strategy=strategy
        )
        if isinstance(fabric.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError("its processes are spawned: give --strategy ddp")
        return fabric
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"--strategy {strategy} --devices {devices} --device {device}: {error}") from error


def launch(fabric: Fabric) -> None:
    """Start the other ranks, or join them.

    Raises:
        InputError: the machines are not what SLURM or torchrun was asked for.
    """
    try:
        fabric.launch()
    except ValueError as error:
        raise InputError(str(error)) from error
    errors.alike = False
