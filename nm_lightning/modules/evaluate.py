"""Accuracy of a network on a loader, outside any Trainer loop."""

from collections.abc import Iterable

import torch
from pytorch_lightning import LightningDataModule
from rich import get_console
from rich.progress import track
from torch import Tensor, nn

from nm_lightning.compression.prepare import modes_kept


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    data: LightningDataModule | None = None,
    device: torch.device | str = "cpu",
    description: str = "evaluating",
) -> float:
    """The share of images whose largest logit is their label's.

    Args:
        model: maps images `(N, ...)` to logits `(N, classes)`; its mode is restored.
        loader: batches of images and labels.
        data: the data module whose batch hooks apply, such as normalisation on the device.
        device: where to compute.
        description: what the progress bar says.

    Returns:
        A fraction, exact to the image.
    """
    correct = total = 0
    model.to(device)  # out of inference mode, where it would make inference tensors of the parameters
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in track(loader, description, transient=True, disable=not get_console().is_terminal):
            images, labels = (part.to(device) for part in batch)
            if data is not None:
                images, labels = data.on_after_batch_transfer((images, labels), 0)
            correct += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    return correct / total
