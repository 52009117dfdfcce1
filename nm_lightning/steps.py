"""A module's own steps outside of a Trainer's loops: what they log, and whether a narrow network can take them."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from torchmetrics import Metric

from nm_lightning.batches import length_of, read
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.structure.copies import modes_kept, plain_copy
from nm_lightning.compression.structure.plan import apply_plan, plan_sites
from nm_lightning.compression.structure.sites import Site
from nm_lightning.compression.structure.unread import Reads

Log = Callable[[str, Any, int | None], None]  # name, value, how many images it is of where that is said


def first_batch(loader: Any) -> Any:
    """A loader's first batch, or None where it can't be had without taking it from others.

    Its own iterator, its generators and all random numbers are left as they were, and so are the batches to come.
    """
    if loader is None or hasattr(loader, "__next__"):
        return None
    twin = copy.copy(loader)
    if isinstance(twin, DataLoader):
        twin._iterator = None  # whose workers persist
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = [own for each in holders if isinstance(own := getattr(each, "generator", None), torch.Generator)]
    states = [own.get_state() for own in generators]
    with isolate_rng():
        batch = next(read(twin), None)
    for own, state in zip(generators, states, strict=True):
        own.set_state(state)
    return batch


def logged(
    module: LightningModule, stage: str, batches: Iterable, trainer: Trainer | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """What the module's `validation_step` or `test_step` logs, its means over all batches.

    Args:
        module: whose metrics are reset; its mode is restored.
        stage: `validation` or `test`.
        batches: as the step takes them; of several ranks, each has its share.
        trainer: that the module finds as its own.
        ranks: the processes that measure together.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    metrics: dict[str, Metric] = {}

    length = 1

    def log(name: str, value: Any, size: int | None) -> None:
        size = size or length
        if isinstance(value, Metric):
            metrics[name] = value
        elif not isinstance(value, Tensor) or value.numel() == 1:
            sums[name][0] += float(value) * size
            sums[name][1] += size

    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()
    with modes_kept(module), torch.no_grad(), _apart(module, trainer, log):
        module.eval()
        getattr(module, f"on_{stage}_epoch_start")()
        for index, batch in enumerate(batches):
            length = length_of(batch)
            _take(getattr(module, f"{stage}_step"), batch, index)
        length = 1
        getattr(module, f"on_{stage}_epoch_end")()
        found = {name: float(metric.compute()) for name, metric in metrics.items()}
    if sums:
        totals = ranks.total(*(torch.tensor(pair, device=module.device) for pair in sums.values()))
        found |= {name: float(total / weight) for name, (total, weight) in zip(sums, totals, strict=True) if weight}
    return found


def reads_of_training(
    module: LightningModule, sites: Sequence[Site], batch: Any, trainer: Trainer
) -> tuple[dict[str, str], set[str]]:
    """The sites without whose removed neurons `training_step` fails, with the reason; and the parameters that it reads.

    Args:
        module: a copy, which is not needed any more; its weights are plain.
        sites: of its `forward`.
        batch: of the training set, on the module's device.
        trainer: that trains the original.
    """
    if not module.automatic_optimization:
        return {}, set()  # it can't be tried by itself
    for images in (_few(batch), batch):
        with Reads() as reads:
            fails = _fails(module, images, trainer)
        if not fails:
            batch = images
            break
    else:
        return {}, set()

    def says(some: Sequence[Site]) -> str:
        """Empty if the step works with half of the neurons of these sites."""
        keeps = {site.name: _half(site) for site in some}
        return _fails(apply_plan(plain_copy(module)[0], plan_sites(some, keeps)), batch, trainer)

    def to_blame(some: Sequence[Site]) -> dict[str, str]:
        """Of sites with which the step fails, those that do it."""
        if len(some) == 1:
            return {some[0].name: f"training_step reads its neurons beside forward: {says(some)}"}
        halves = (some[: len(some) // 2], some[len(some) // 2 :])
        return {name: why for half in halves if says(half) for name, why in to_blame(half).items()}

    whole: dict[str, str] = {}
    rest = list(sites)
    while rest and (why := says(rest)):
        found = to_blame(rest) or {site.name: f"training_step fails without its neurons: {why}" for site in rest}
        whole |= found
        rest = [site for site in rest if site.name not in found]
    return whole, reads.names(module)


def _few(batch: Any, count: int = 2) -> Any:
    """The first images of a batch, and what goes with them: of all tensors as long as the first, the first entries."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    length = len(tensors[0]) if tensors else 0

    def cut(leaf: Any) -> Any:
        return leaf[:count] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == length else leaf

    return pytree.tree_map(cut, batch)


def _half(site: Site) -> Tensor:
    size = site.width // site.step
    return site.survivors(torch.arange(site.width, 0, -1).float(), site.step * max(1, size // 2))


def _fails(module: LightningModule, batch: Any, trainer: Trainer) -> str:
    """What `training_step` says of a batch, in a line; empty if it takes it."""
    batch = copy.deepcopy(batch)
    try:
        with isolate_rng(), _apart(module, trainer, lambda *_: None), trainer.precision_plugin.train_step_context():
            module.train()
            _take(module.training_step, batch, 0)
    except Exception as error:  # whatever the user's step raises
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ""


def _take(step: Callable, batch: Any, index: int) -> Any:
    """Call a step with as many of its batch, its number and its loader's as it takes."""
    kinds = [own.kind for own in inspect.signature(step).parameters.values()]
    count = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else len(kinds)
    return step(*(batch, index, 0)[:count])


@contextmanager
def _apart(module: LightningModule, trainer: Trainer | None, log: Log) -> Iterator[None]:
    """What the module logs goes to `log` and nowhere else; `trainer` is its own meanwhile."""

    def one(name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        log(name, value, batch_size)

    def several(values: Any, *_: Any, **options: Any) -> None:
        for name, value in values.items():
            one(name, value, **options)

    before, module._trainer = module._trainer, trainer
    vars(module).update(log=one, log_dict=several)
    try:
        yield
    finally:
        module._trainer = before
        del vars(module)["log"], vars(module)["log_dict"]
