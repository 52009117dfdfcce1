"""Fine-tuning without labels: the narrow network learns the original's predictions on images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.compression.report import Report
from nm_lightning.compression.settings import Refinement, choice, setting, whole
from nm_lightning.compression.statistics.predictions import check_logits
from nm_lightning.compression.statistics.ranks import ALONE, Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import evaluated, modes_kept, with_data
from nm_lightning.compression.structure.inputs import Inputs, call, clone, to
from nm_lightning.compression.structure.operations import BATCH_NORMS
from nm_lightning.compression.structure.plan import Plan, learned
from nm_lightning.errors import InputError
from nm_lightning.progress import progress

RATES = {"calibration": 3e-4, "training": 1e-3}  # of Adam, at the start; it falls to zero along a cosine
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Distill(Refinement):
    """Trains the narrow network on the original's predictions, without labels.

    On the calibration images, BatchNorms keep their statistics. On all training images, augmented as they were in
    training, they learn new ones.
    """

    name, turn = "finetune", 3
    epochs: int = setting(
        1,
        "epochs of training on the original's predictions, no labels",
        whole(0, "epochs"),
        flag="finetune",
        off=0,
    )
    images: str = setting(
        "calibration",
        "what finetune sees: the calibration images, or all training images, augmented",
        choice(*RATES),
        flag="finetune_on",
    )

    @property
    def looks(self) -> bool:
        """Only where it sees the calibration images."""
        return not self.trains

    @property
    def trains(self) -> bool:
        """Where it sees all training images."""
        return self.images == "training"

    def refine(self, subject: Subject, narrow: nn.Module, plan: Plan, report: Report) -> dict[str, Tensor]:
        """The narrow network's parameters and buffers, trained in a copy."""
        learner = with_data(narrow)
        first = next(parameter for parameter in learner.parameters())
        original, rate = evaluated(subject.model).to(first.dtype), RATES[self.images]
        seen = Taken(subject, first) if self.trains else [to(batch, dtype=first.dtype) for batch in subject.batches]
        distill(learner, original, seen, self.epochs, subject.seed, subject.ranks, rate, self.trains)
        return learned(learner)


class Taken:
    """Training batches as the network reads them: what is no input is left, and floats have its dtype.

    Args:
        subject: whose loader it is.
        like: a tensor on the device and of the dtype.
    """

    def __init__(self, subject: Subject, like: Tensor):
        self.subject, self.like = subject, like

    def __len__(self) -> int:
        try:
            return len(self.subject.training)
        except TypeError as error:
            raise InputError("finetune_on training: the loader has no length") from error

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self.subject.training:
            inputs = self.subject.calibration.taken(batch)
            yield to(to(inputs, self.like.device), dtype=self.like.dtype)


def distill(
    narrow: nn.Module,
    original: nn.Module,
    batches: Sequence[Inputs] | Taken,
    epochs: int,
    seed: int = 0,
    ranks: Ranks = ALONE,
    rate: float = RATES["calibration"],
    norms: bool = False,
) -> None:
    """Train `narrow` in place on the Kullback-Leibler divergence from `original`'s softened predictions.

    After Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        narrow: the compressed network; parameters that ask for no gradient stay.
        original: the network as it was, in evaluation mode; it is only read.
        batches: inputs as the network is called with: a list, or what gives others at each pass.
        epochs: passes over them.
        seed: of the batches' order.
        ranks: that each have a share of the images; a step takes one batch from each.
        rate: of Adam, at the start.
        norms: whether BatchNorms learn other statistics.
    """
    wanted = [parameter for parameter in narrow.parameters() if parameter.requires_grad]
    if not epochs or not wanted:
        return
    optimiser = torch.optim.Adam(wanted, lr=rate)
    device = wanted[0].device
    (steps,) = ranks.total(torch.tensor(len(batches), device=device))
    steps = -(-int(steps) // ranks.size)  # of an epoch, the same on every rank
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    learner = narrow
    if ranks.size > 1:
        learner = nn.parallel.DistributedDataParallel(narrow, find_unused_parameters=True)
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with modes_kept(narrow), torch.enable_grad(), forked:
        narrow.train()
        for module in narrow.modules():
            if isinstance(module, BATCH_NORMS) and not norms:
                module.eval()
        torch.manual_seed(seed)  # of dropout, and of what the loader draws
        pairs = _anew(batches, original, epochs, steps)
        if isinstance(batches, Sequence):
            pairs = _again(batches, original, epochs, steps, seed)
        for batch, target in progress(pairs, "distilling", epochs * steps):
            predicted = _softened(learner, batch)
            loss = F.kl_div(predicted, target, reduction="batchmean", log_target=True)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    optimiser.zero_grad(set_to_none=True)


def _again(
    batches: Sequence[Inputs], original: nn.Module, epochs: int, steps: int, seed: int
) -> Iterator[tuple[Inputs, Tensor]]:
    """The same batches in another order each epoch, with the original's predictions, which are computed once."""
    with torch.no_grad():
        targets = [_softened(original, batch) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(steps, generator=generator).tolist():
            index %= len(batches)
            yield batches[index], targets[index]


def _anew(batches: Iterable[Inputs], original: nn.Module, epochs: int, steps: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Other batches each epoch, each with the original's predictions."""
    for _ in range(epochs):
        for batch in islice(batches, steps):
            with torch.no_grad():
                target = _softened(original, batch)
            yield batch, target


def _softened(model: nn.Module, batch: Inputs) -> Tensor:
    """Log-probabilities at `TEMPERATURE`."""
    return (check_logits(call(model, clone(batch))) / TEMPERATURE).log_softmax(dim=-1)
