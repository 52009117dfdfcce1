"""Before and after: accuracy, size and speed of a network and of what compression makes of it."""

import itertools
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from nm_lightning.batches import Key, hits, inputs_and_labels, logits_of, read, threshold_of
from nm_lightning.compression import CompressionResult, Compressor, Recipe, Site, SiteReport, cost
from nm_lightning.compression.files.quantize import OnnxFile
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.structure.copies import modes_kept
from nm_lightning.compression.structure.inputs import Inputs, call, like, repeated, tensors_in, to
from nm_lightning.compression.structure.vectors import neuron_vectors
from nm_lightning.errors import InputError
from nm_lightning.progress import progress

KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
BATCHES = (1, 128)  # whose latency is measured
LANES = 8  # channels that processors like to have at once
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PROBED = 16  # images that tell which layout is faster
SLACK = 0.1  # by which the share of time that is left may exceed the share of MACs


@dataclass(frozen=True)
class Latency:
    """Milliseconds for an image, in evaluation mode: the median of the runs and their quartiles."""

    batch: int
    median: float
    low: float
    high: float


@dataclass
class Baseline:
    """The original network: accuracy (a fraction, None without labels), parameters, and MACs for one image.

    `logged` is what its own steps log, where accuracy can't be told.
    """

    accuracy: float | None
    parameters: int
    macs: int
    latency: list[Latency] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A file as onnxruntime runs it on the CPU: its name, size, accuracy (a fraction, None without labels), latency."""

    file: str
    bytes: int
    accuracy: float | None
    latency: list[Latency]


@dataclass
class Result:
    """One cell of the grid.

    Attributes:
        method: prune, merge, ...
        criterion: which neurons stayed.
        ratio: share of neurons removed at each site; None where widths or a target were given.
        recipe: all that was asked for, as `Recipe.to_dict` gives it.
        accuracy: a fraction of the test set; None where there are no labels.
        parameters: of the compressed network.
        macs: multiply-accumulates for one image.
        seconds: of the compression alone.
        widths: survivors by site.
        notes: what a reader should know.
        compared: how the narrow network was compared with the masked wide one, see `Report`.
        checkpoint: the file's name in the same folder.
        removed: share of all the sites' neurons that is gone.
        sites: what happened at each.
        similarity: of the removed neurons' largest cosines with a survivor, how many fall into each of 20 equal bins
            from -1 to 1.
        latency: at each batch size, where it was measured.
        logged: by its own steps, where accuracy can't be told.
        command: of compress.py that gives this result again.
        exported: its ONNX file and the one in 8 bits, where that was asked for.
    """

    method: str
    criterion: str
    ratio: float | None
    recipe: dict[str, Any]
    accuracy: float | None
    parameters: int
    macs: int
    seconds: float
    widths: dict[str, int]
    notes: list[str]
    compared: str
    checkpoint: str
    removed: float
    sites: list[SiteReport] = field(default_factory=list)
    similarity: list[int] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    command: str = ""
    exported: list[Exported] = field(default_factory=list)


@dataclass
class Measure:
    """Measures the original and what becomes of it on the same test set.

    Attributes:
        example: a batch that the networks accept, on their device.
        loader: of the test set; None where there are no inputs with class labels.
        data: whose batch hooks apply: a data module or a LightningModule.
        ranks: the processes that measure together.
        timed: whether latency is measured, too.
        keys: of images and labels in a batch, where they have no name that is known.
        own: what a network's own steps log, where there is no accuracy.
    """

    example: Inputs
    loader: Iterable | None
    data: Any = None
    ranks: Ranks = ALONE
    timed: bool = False
    keys: tuple[Key, Key] = (None, None)
    own: Callable[[nn.Module], dict[str, float]] = lambda model: {}

    def original(self, model: nn.Module) -> Baseline:
        """Of the network as it was."""
        size = cost(model, self.example)
        return Baseline(
            self._accuracy(model, "original"), size.parameters, size.macs, self._latency(model), self.own(model)
        )

    def compressed(self, compressor: Compressor, recipe: Recipe, checkpoint: str) -> tuple[CompressionResult, Result]:
        """Compress, and measure what comes of it.

        Args:
            compressor: holds the original.
            recipe: to be followed.
            checkpoint: the name of the file that will hold the result.
        """
        start = time.perf_counter()
        found = compressor(recipe)
        seconds = time.perf_counter() - start
        size, total = cost(found.model, self.example), sum(site.before for site in found.report.sites)
        method, criterion, ratio = recipe.method.label, recipe.criterion.label, recipe.budget.share_removed
        return found, Result(
            method=method,
            criterion=criterion,
            ratio=ratio,
            recipe=recipe.to_dict(),
            accuracy=self._accuracy(found.model, " ".join([method, criterion, recipe.budget.says])),
            parameters=size.parameters,
            macs=size.macs,
            seconds=round(seconds, 3),
            widths=found.report.widths,
            notes=found.report.notes,
            compared=found.report.compared,
            checkpoint=checkpoint,
            removed=1 - sum(found.report.widths.values()) / total if total else 0.0,
            sites=found.report.sites,
            similarity=similarity(compressor.subject.tensors, found.sites, found.keep),
            latency=self._latency(found.model),
            logged=self.own(found.model),
        )

    def exported(self, path: Path) -> Exported:
        """An ONNX file, by this process alone and on the CPU, whatever the networks are on."""
        model, accuracy = OnnxFile(path), None
        if self.loader is not None:
            accuracy = evaluate(model, self.loader, self.data, "cpu", path.name, keys=self.keys)
        return Exported(path.name, path.stat().st_size, accuracy, latency(model, to(self.example, "cpu")))

    def _accuracy(self, model: nn.Module, title: str) -> float | None:
        if self.loader is None:
            return None
        device = tensors_in(self.example)[0].device
        return evaluate(model, self.loader, self.data, device, title, self.ranks, self.keys)

    def _latency(self, model: nn.Module) -> list[Latency]:
        return latency(model, self.example) if self.timed else []


def evaluate(
    model: nn.Module,
    loader: Iterable,
    data: Any = None,
    device: torch.device | str = "cpu",
    description: str = "evaluating",
    ranks: Ranks = ALONE,
    keys: tuple[Key, Key] = (None, None),
) -> float:
    """The share of images whose class is their label's: by the largest logit, or by the sign of a single one.

    Args:
        model: maps images `(N, ...)` to logits, see `logits_of`; its mode is restored.
        loader: batches of images and labels, see `inputs_and_labels`.
        data: whose batch hooks apply, such as normalisation on the device: a data module or a LightningModule.
        device: where to compute.
        description: what the progress bar says.
        ranks: the processes that evaluate together; they all have the same loader.
        keys: of the images and the labels in a batch, where they have no name that is known.

    Returns:
        A fraction, exact to the image: over several ranks too, each image counts once.

    Raises:
        InputError: these are no logits and class labels, or the data set has changed.
    """
    model.to(device)  # out of inference mode, where it would make inference tensors of the parameters
    batches = on_device(progress(dealt(loader, ranks), description), data, device)
    return share_right(model, batches, ranks, keys, device)


def share_right(
    model: nn.Module,
    batches: Iterable,
    ranks: Ranks = ALONE,
    keys: tuple[Key, Key] = (None, None),
    device: torch.device | str = "cpu",
) -> float:
    """`evaluate` on this rank's batches as they lie on the device."""
    correct = total = 0
    threshold = layout = None
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in batches:
            images, labels = inputs_and_labels(batch, *keys)
            images = as_read(images, model)
            layout = layout or faster_layout(model, images)
            if layout is torch.channels_last:
                images = images.contiguous(memory_format=layout)
            logits = logits_of(model(images))
            if threshold is None and isinstance(logits, Tensor) and logits[:1].numel() == 1:
                with torch.inference_mode(False), torch.enable_grad():
                    threshold = threshold_of(logits_of(model(images[:1].clone())))
            right = hits(logits, labels, threshold or 0.0)
            if right is None:
                raise InputError("accuracy: the batches hold no class labels, or the network gives no logits for them")
            correct += int(right.sum())
            total += len(right)
    correct, total = ranks.total(*torch.tensor([correct, total], device=device))
    return int(correct) / int(total)


def faster_layout(model: nn.Module, images: Any) -> torch.memory_format:
    """In which layout a network in evaluation mode is faster, by the clock, on the first images of a batch.

    It is `channels_last` only for photographs `(N, C, H, W)` on a CPU, and where it gives the same predictions; the
    network's weights stay as they lie.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.is_cuda or len(images) < PROBED:
        return torch.contiguous_format
    last = images[:PROBED].contiguous(memory_format=torch.channels_last)
    seconds: dict[bool, float] = {}
    predicted: dict[bool, Tensor] = {}
    try:
        for probe, is_last in ((images[:PROBED], False), (last, True)) * 2:
            start = time.perf_counter()
            predicted[is_last] = logits_of(model(probe)).argmax(dim=-1)
            taken = time.perf_counter() - start
            seconds[is_last] = min(taken, seconds.get(is_last, taken))
    except (RuntimeError, AttributeError, TypeError):  # a view that wants its channels first, or other outputs
        return torch.contiguous_format
    faster = seconds[True] < seconds[False] and torch.equal(predicted[True], predicted[False])
    return torch.channels_last if faster else torch.contiguous_format


def on_device(batches: Iterable, data: Any, device: torch.device | str) -> Iterator[Any]:
    """Batches on a device, after the hooks of a data module or a LightningModule, where there is one.

    Raises:
        InputError: the data set has changed under way.
    """
    for batch in read(batches):
        if data is None:
            yield move_data_to_device(batch, torch.device(device))
            continue
        batch = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), torch.device(device), 0)
        yield data.on_after_batch_transfer(batch, 0)


def as_read(images: Any, model: nn.Module) -> Any:
    """Images as the network's weights are, see `like`; what is no tensor stays."""
    return like(images, model) if isinstance(images, Tensor) else images


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


def latency(model: nn.Module, example: Inputs, seconds: float = 1.0) -> list[Latency]:
    """Time a network at each of `BATCHES`, after a warm-up.

    Args:
        model: on the device where it is to be timed; its mode is restored.
        example: an input `(N, ...)` on that device; its first image is repeated.
        seconds: about so much for each batch size; slow networks run at least 5 times.
    """
    found = []
    with modes_kept(model), torch.inference_mode():
        model.eval()
        for batch in BATCHES:
            images = repeated(example, batch)

            def once(images: Inputs = images) -> None:
                call(model, images)
                if tensors_in(images)[0].is_cuda:
                    torch.cuda.synchronize()

            timer = timeit.Timer(once)
            each = min(timer.repeat(repeat=3, number=1))  # the warm-up too
            number = max(1, round(seconds / 20 / each))
            repeat = min(20, max(5, round(seconds / each)))
            times = torch.tensor(timer.repeat(repeat, number)) * 1000 / number / batch
            low, median, high = times.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            found.append(Latency(batch, median, low, high))
    return found


def odd_widths(baseline: Baseline, results: Sequence[Result], original: nn.Module) -> None:
    """Add a note to the result, if there is one, where odd widths may be why less time has gone than work.

    That is, where most of the convolutions that shrank have no multiple of 8 channels any more, and the share of
    the time that is left exceeds that of the MACs by more than a tenth; it goes to the result where it does so most.

    Args:
        baseline: the original.
        results: what became of it.
        original: the network.
    """
    convolutions = {name for name, layer in original.named_modules() if isinstance(layer, CONVOLUTIONS)}
    found: list[tuple[float, str, Result]] = []
    for row in results:
        whole = [site for site in row.sites if site.name in convolutions and site.before % LANES == 0]
        shrunk = [site.after for site in whole if site.after < site.before]
        chosen, macs = row.recipe["budget"], row.macs / baseline.macs
        odd = sum(width % LANES > 0 for width in shrunk)
        if 2 * odd <= len(shrunk) or chosen.get("round_to") != 1 or "widths" in chosen:
            continue
        for before, after in zip(baseline.latency, row.latency, strict=True):
            time = after.median / before.median
            shares = f"{100 * time:.0f} % of the time with {100 * macs:.0f} % of the MACs"
            found.append((time - macs, f"{shares}, {after.batch} at once", row))
    excess, said, row = max(found, key=lambda each: each[0], default=(0.0, "", None))
    if row is not None and excess > SLACK:
        name = ", ".join([row.method, row.criterion, *([] if row.ratio is None else [f"{row.ratio:g}"])])
        few = f"most convolutions have no multiple of {LANES} channels now"
        row.notes.append(f"{name} takes {said}: {few}, --round_to {LANES} may be faster")


@torch.no_grad()
def similarity(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], keep: Mapping[str, Tensor], bins: int = 20
) -> list[int]:
    """How like the survivors the removed neurons were: their largest cosine with one, counted in bins from -1 to 1.

    Args:
        tensors: the original network's, by name.
        sites: of the original.
        keep: by site, the survivors.
        bins: equally wide.
    """
    counts = torch.zeros(bins)
    for site in sites:
        if site.producers[0].even(site.width) and len(keep[site.name]) < site.width:
            vectors = F.normalize(neuron_vectors(site.producers[0], tensors, with_bias=False).float(), dim=1)
            gone = torch.ones(site.width, dtype=torch.bool)
            gone[keep[site.name]] = False
            nearest = [(part @ vectors[keep[site.name]].T).amax(dim=1) for part in vectors[gone].split(1024)]
            counts += torch.cat(nearest).clamp(-1, 1).cpu().histc(bins, -1, 1)
    return counts.int().tolist()
