"""Accuracy of a network on a loader, outside any Trainer loop."""

import itertools
from collections.abc import Iterable

import torch
from pytorch_lightning import LightningDataModule
from rich import get_console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from nm_lightning.compression.prepare import modes_kept
from nm_lightning.compression.ranks import ALONE, Ranks

KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    data: LightningDataModule | None = None,
    device: torch.device | str = "cpu",
    description: str = "evaluating",
    ranks: Ranks = ALONE,
) -> float:
    """The share of images whose largest logit is their label's.

    Args:
        model: maps images `(N, ...)` to logits `(N, classes)`; its mode is restored.
        loader: batches of images and labels.
        data: the data module whose batch hooks apply, such as normalisation on the device.
        device: where to compute.
        description: what the progress bar says.
        ranks: the processes that evaluate together; they all have the same loader.

    Returns:
        A fraction, exact to the image: over several ranks too, each image counts once.
    """
    correct = total = 0
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    model.to(device)  # out of inference mode, where it would make inference tensors of the parameters
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in track(dealt(loader, ranks), description, transient=True, disable=not get_console().is_terminal):
            images, labels = (part.to(device) for part in batch)
            if data is not None:
                images, labels = data.on_after_batch_transfer((images, labels), 0)
            images = images.to(dtype) if images.is_floating_point() else images
            correct += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    correct, total = ranks.total(*torch.tensor([correct, total], device=device))
    return int(correct) / int(total)


def dealt(loader: Iterable, ranks: Ranks) -> Iterable:
    """This rank's batches of a loader, dealt in turn: none is padded, and each is what one process would see.

    Where Lightning has put a distributed sampler around the loader's own, the loader's own counts. Rank 0's order is
    dealt. Where there is no data set to index, each rank reads all and keeps its own.
    """
    if ranks.size == 1:
        return loader
    batches = getattr(loader, "batch_sampler", None)
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or batches is None:
        return itertools.islice(loader, ranks.rank, None, ranks.size)
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if type(batches) is not BatchSampler:
            return loader  # the user's own batches, which are shared out already
        inner = getattr(sampler.dataset, "_sampler", None) or SequentialSampler(loader.dataset)
        batches = BatchSampler(inner, batches.batch_size, batches.drop_last)
    own = ranks.first(list(batches))[ranks.rank :: ranks.size]
    return DataLoader(loader.dataset, batch_sampler=own, **{name: getattr(loader, name) for name in KEPT})
