"""Accuracy of a network on a loader, outside any Trainer loop."""

import itertools
from collections.abc import Iterable

import torch
from pytorch_lightning import LightningDataModule
from rich import get_console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from nm_lightning.compression.prepare import modes_kept
from nm_lightning.compression.ranks import ALONE, Ranks


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
    model.to(device)  # out of inference mode, where it would make inference tensors of the parameters
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in track(dealt(loader, ranks), description, transient=True, disable=not get_console().is_terminal):
            images, labels = (part.to(device) for part in batch)
            if data is not None:
                images, labels = data.on_after_batch_transfer((images, labels), 0)
            correct += int((model(images).argmax(dim=1) == labels).sum())
            total += len(labels)
    correct, total = ranks.total(*torch.tensor([correct, total], device=device))
    return int(correct) / int(total)


def dealt(loader: Iterable, ranks: Ranks) -> Iterable:
    """This rank's batches of a loader, dealt in turn: none is padded, and each is what one process would see.

    A loader that Lightning has given a distributed sampler, or that shuffles, is read in the data set's order. Without
    a data set to index, each rank reads all and keeps its own.
    """
    if ranks.size == 1:
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return itertools.islice(loader, ranks.rank, None, ranks.size)
    batches = loader.batch_sampler
    if type(batches) is BatchSampler and isinstance(batches.sampler, RandomSampler | DistributedSampler):
        batches = BatchSampler(SequentialSampler(loader.dataset), loader.batch_size, loader.drop_last)
    own = list(itertools.islice(batches, ranks.rank, None, ranks.size))
    options = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn, "pin_memory": loader.pin_memory}
    return DataLoader(loader.dataset, batch_sampler=own, **options)
