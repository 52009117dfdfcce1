"""How many neurons stay at each site."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import gcd, lcm
from typing import TypeVar

import torch
from torch import Tensor, nn

from nm_lightning.compression.methods import Reconstruct
from nm_lightning.compression.selection.criteria import L2Norm
from nm_lightning.compression.selection.output_aware import choose_by_output, closest, costs_of, watched
from nm_lightning.compression.settings import Budget, Values, choice, is_number, setting, whole
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.copies import plain_copy, without_data
from nm_lightning.compression.structure.cost import cost
from nm_lightning.compression.structure.inputs import Inputs, call, first, length, tensors_in, to
from nm_lightning.compression.structure.plan import apply_plan, plan_sites
from nm_lightning.compression.structure.sites import Site
from nm_lightning.errors import InputError

T = TypeVar("T")


def floor(neurons: int, ratio: float) -> int:
    """`floor(n (1 - r))`, at least 1; a product that is whole but for rounding counts as whole.

    >>> floor(20, 0.9), floor(16, 0.3), floor(2, 0.9)
    (2, 11, 1)
    """
    return max(1, int(round(neurons * (1 - ratio), 9)))


def nearest(neurons: int, ratio: float) -> int:
    """Python's `round` of `n (1 - r)`, of the float product: LeNet's and AlexNet's in the paper."""
    return round(neurons * (1 - ratio))


def truncated(neurons: int, ratio: float) -> int:
    """`int` of the float product `n (1 - r)`: ResNet-56's in the paper."""
    return int(neurons * (1 - ratio))


def four_times_truncated(neurons: int, ratio: float) -> int:
    """Truncated before a factor of 4: WideResNet-40-4's in the paper."""
    return 4 * int(neurons // 4 * (1 - ratio))


ROUNDINGS = {each.__name__: each for each in (floor, nearest, truncated, four_times_truncated)}
RATIO = Values("a number from 0 (keep all) to below 1", lambda ratio: is_number(ratio) and 0 <= ratio < 1)
ROUNDING = Values(allow=lambda each: callable(each) or each in ROUNDINGS, choices=tuple(ROUNDINGS))
SHARE = Values("the share that may stay, a number between 0 and 1", lambda share: is_number(share) and 0 < share < 1)
_ratio = partial(setting, 0.5, "share of each site's neurons to remove", RATIO, auto=True)
_rounding = partial(setting, "floor", f"of the survivors' number: {', '.join(ROUNDINGS)}", ROUNDING, auto=True)
_round_to = partial(
    setting, 1, "survivors' channels to the nearest multiple of it, 8 runs fast; widths stay as given", whole(1)
)


@dataclass(frozen=True)
class Ratio(Budget):
    """The same share of every site's neurons goes, or what costs least of as many multiply-accumulates."""

    name = "ratio"
    ratio: float = _ratio()
    rounding: str | Callable[[int, float], int] = _rounding()
    round_to: int = _round_to()
    spread: str = setting(
        "even",
        "even: every site loses the ratio; cost: as many multiply-accumulates go where that costs least, if held-out "
        "images agree",
        choice("even", "cost"),
    )

    @property
    def looks(self) -> bool:
        """Whether costs are measured."""
        return self.spread == "cost"

    @property
    def share_removed(self) -> float:
        """The ratio."""
        return self.ratio

    def check(self, subject: Subject) -> None:
        """The ratio must fit."""
        self._evenly(subject)

    def counts(self, subject: Subject) -> dict[str, int]:
        """At least one survivor, and a multiple of the site's step and of `round_to`.

        By cost, the widths are shared as `Macs` does, for as many multiply-accumulates as the ratio leaves, and those
        are taken with which a reconstructed network's predictions change less on held-out images.
        """
        even = self._evenly(subject)
        if self.spread == "even" or not self.ratio:
            return even
        size, seen = sized(subject, Macs.measured), watched(subject)
        share = size(even) / size({site.name: site.width for site in subject.sites})
        shared = share_cut(subject.sites, costs_of(subject.sites, seen), size, share, self.round_to, even)
        widths = {"cost": shared, "even": even}
        method, norm = Reconstruct(), L2Norm()
        choices = {
            name: norm.choose(subject, counts, method) | choose_by_output(subject.sites, counts, seen)
            for name, counts in widths.items()
        }
        return widths[closest(choices, subject, method, "spread")]

    def _evenly(self, subject: Subject) -> dict[str, int]:
        rounded = self.rounding if callable(self.rounding) else ROUNDINGS[self.rounding]
        counts = {site.name: rounded(site.width, self.ratio) if self.ratio else site.width for site in subject.sites}
        counts = {site.name: multiple(site, counts[site.name], self.round_to) for site in subject.sites}
        check_counts(subject.sites, counts)
        return counts


@dataclass(frozen=True)
class Widths(Budget):
    """The survivors themselves."""

    name = "widths"
    widths: Sequence[int] | Mapping[str, int] = setting(
        (), "survivors: an integer for each site in order, or site=width", off=None, auto=True
    )
    ratio: float = _ratio()
    rounding: str | Callable[[int, float], int] = _rounding()
    round_to: int = _round_to()

    @property
    def share_removed(self) -> float | None:
        """The ratio that other sites follow, if there are others."""
        return self.ratio or None if isinstance(self.widths, Mapping) else None

    def counts(self, subject: Subject) -> dict[str, int]:
        """As they stand.

        Raises:
            InputError: they don't fit the sites.
        """
        sites, counts = subject.sites, Ratio(self.ratio, self.rounding, self.round_to).counts(subject)
        if isinstance(self.widths, Mapping):
            unknown = [name for name in self.widths if name not in counts]
            if unknown:
                raise InputError(f"widths name the site {unknown[0]!r}, which is none of: {listing(sites)}")
            counts |= self.widths
        else:
            if len(self.widths) != len(sites):
                raise InputError(f"{len(self.widths)} widths for {len(sites)} sites: {listing(sites)}")
            counts = {site.name: width for site, width in zip(sites, self.widths, strict=True)}
        check_counts(sites, counts)
        return counts


@dataclass(frozen=True)
class Target(Budget):
    """A share of the network's size may stay; each site gives up what costs least.

    A cost is the measured error of reconstruction on the calibration images, see `output_aware.costs_of`.
    """

    looks = True

    @property
    def says(self) -> str:
        """What and how much of it."""
        return f"{self.name}{self.share:g}"

    def counts(self, subject: Subject) -> dict[str, int]:
        """The largest widths found that meet the target; sizes are found without the network's data."""
        return self._cut(subject, costs_of(subject.sites, watched(subject)))

    def check(self, subject: Subject) -> None:
        """The target must be within reach if every neuron may go."""
        self._cut(subject, {site.name: torch.zeros(site.width - site.step) for site in subject.sites})

    def size(self, subject: Subject) -> Callable[[Mapping[str, int]], float]:
        """What the network's size is at given widths; found without its data."""
        return sized(subject, self.measured)

    def _cut(self, subject: Subject, costs: Mapping[str, Tensor]) -> dict[str, int]:
        return share_cut(subject.sites, costs, self.size(subject), self.share, self.round_to)


@dataclass(frozen=True)
class Parameters(Target):
    """A share of the network's parameters may stay."""

    name = "parameters"
    share: float = setting(
        0.5,
        "share of parameters that may stay, cut where it costs least",
        SHARE,
        flag="target_parameters",
        off=None,
    )
    round_to: int = _round_to()

    @staticmethod
    def measured(network: nn.Module, example: Inputs) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Macs(Target):
    """A share of the network's multiply-accumulates may stay."""

    name = "macs"
    share: float = setting(0.5, "likewise, of the multiply-accumulates", SHARE, flag="target_macs", off=None)
    round_to: int = _round_to()

    @staticmethod
    def measured(network: nn.Module, example: Inputs) -> int:
        """The multiply-accumulates of one image."""
        return cost(network, example).macs


@dataclass(frozen=True)
class Latency(Target):
    """A share of the time of a forward pass may stay, measured on this machine with a batch like the example.

    As in ZipLM (Kurtic et al., NeurIPS 2023, arXiv 2302.04089) time is measured, not counted: once for each site cut to
    the least, which tells what its neurons cost, and at each step of the search. Clocks differ, so widths may, too.
    """

    name = "latency"
    share: float = setting(
        0.5, "likewise, of the time of a batch like the example, measured here", SHARE, flag="target_latency", off=None
    )
    round_to: int = _round_to()

    def check(self, subject: Subject) -> None:
        """Nothing is timed before there is work to do."""

    def counts(self, subject: Subject) -> dict[str, int]:
        """The largest widths found that meet the target by the clock."""
        found = super().counts(subject)
        left = self.size(subject)(found)
        subject.remarks.append(
            f"target_latency {self.share:g}: {left:.2f} of the original's time, measured again with "
            f"{length(subject.example)} on {next(subject.model.parameters()).device}"
        )
        return found

    def size(self, subject: Subject) -> Callable[[Mapping[str, int]], float]:
        """The share of the original's time that the first rank measures, once for the same widths."""
        original, inputs = subject.evaluated, subject.inputs(length(subject.example))
        whole = {site.name: site.width for site in subject.sites}
        narrowed, known = at_widths(subject.sites, original), {}

        def share(widths: Mapping[str, int]) -> float:
            key = tuple(widths[name] for name in whole)
            if key not in known:
                own = share_of_time(narrowed(widths), original, inputs) if subject.ranks.rank == 0 else None
                known[key] = subject.ranks.first(own)
            return known[key]

        return lambda widths: 1.0 if widths == whole else share(widths)


@torch.no_grad()
def share_of_time(small: nn.Module, original: nn.Module, inputs: Inputs) -> float:
    """A network's time as a share of another's: the median of at least ten pairs of passes, and 0.4 s.

    They take turns, so that what else the machine does slows both.
    """
    device, pairs = tensors_in(inputs)[0].device, []

    def seconds(network: nn.Module) -> float:
        start = time.perf_counter()
        call(network, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for network in (small, original):
        seconds(network)
    while len(pairs) < 10 or sum(map(sum, pairs)) < 0.4:
        pairs.append((seconds(small), seconds(original)))
    return statistics.median(own / other for own, other in pairs)


def at_widths(sites: Sequence[Site], model: nn.Module) -> Callable[[Mapping[str, int]], nn.Module]:
    """What makes a network of given widths, whichever neurons stay."""

    def narrowed(widths: Mapping[str, int]) -> nn.Module:
        keeps = {site.name: site.survivors(torch.zeros(site.width), widths[site.name]) for site in sites}
        return apply_plan(plain_copy(model)[0], plan_sites(sites, keeps))

    return narrowed


def sized(subject: Subject, measured: Callable[[nn.Module, Inputs], T]) -> Callable[[Mapping[str, int]], T]:
    """What `measured` says of the network at given widths, found without its data."""
    narrowed = at_widths(subject.sites, without_data(subject.model).eval())
    example = to(first(subject.example, 1), "meta")
    return lambda widths: measured(narrowed(widths), example)


def choose(sites: Sequence[Site], patterns: str | Sequence[str] | None) -> list[Site]:
    """The sites whose layer names match one of the glob patterns; all of them where `patterns` is None.

    Raises:
        InputError: a pattern matches no site.
    """
    if patterns is None:
        return list(sites)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise InputError(f"sites {pattern!r} matches none of: {listing(sites)}")
    return [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]


def check_counts(sites: Sequence[Site], counts: Mapping[str, int]) -> None:
    """Raise `InputError` unless each site has a number of survivors that fits it."""
    for site in sites:
        count = counts[site.name]
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= site.width:
            raise InputError(f"width {count!r} for {site.name}: give a whole number from 1 to {site.width}")
        if count % site.step:
            raise InputError(f"width {count} for {site.name}: its groups ask for a multiple of {site.step}")


def multiple(site: Site, count: int, round_to: int = 1) -> int:
    """The survivors nearest to `count`, more of two, with which the site's layer has a multiple of `round_to` channels.

    Its groups' quota holds, at least one multiple stays, and a site that keeps all, or has too few, stays whole. With
    `round_to` 1, `count` rounded down to the quota.
    """
    if round_to == 1 or count == site.width:
        return max(site.step, count // site.step * site.step)
    first = site.producers[0]
    channels = first.positions().shape[1] if first.even(site.width) else 1  # of one neuron; a head has several
    quota = lcm(site.step, round_to // gcd(round_to, channels))
    return min(site.width, max(quota, (2 * count + quota) // (2 * quota) * quota))


def share_cut(
    sites: Sequence[Site],
    costs: Mapping[str, Tensor],
    size: Callable[[Mapping[str, int]], float],
    target: float,
    round_to: int = 1,
    others: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Widths that bring a network to a share of its size where it costs least.

    One price per parameter (or MAC) for all sites: each gives up neurons as long as the next one costs less than the
    price of what goes with it. The price is found by bisection.

    Args:
        sites: the sites.
        costs: by site, what each further removal costs, `(n - step,)`; a cheaper one behind a dearer one costs as much.
        size: of a network with given widths.
        target: share of the size that may stay, in (0, 1).
        round_to: see `multiple`.
        others: the widths of sites without costs; by default these keep theirs.

    Returns:
        The largest widths found that meet the target.

    Raises:
        InputError: the sites can't shrink the network so far.
    """
    full = {site.name: site.width for site in sites}
    whole, prices = size(full), {}
    for site in sites:
        if site.name in costs:
            saved = (whole - size(full | {site.name: site.step})) / max(1, site.width - site.step)  # by one neuron
            prices[site.name] = costs[site.name].cummax(dim=0).values / max(saved, 1e-9)

    def widths(price: float) -> dict[str, int]:
        cut = {name: int((each <= price).sum()) for name, each in prices.items()}
        cut = {site.name: cut.get(site.name, 0) // site.step * site.step for site in sites}
        found = {site.name: multiple(site, site.width - cut[site.name], round_to) for site in sites}
        return found | {name: width for name, width in (others or {}).items() if name not in costs}

    every = torch.cat([torch.zeros(1, dtype=torch.double), *prices.values()]).unique()
    if size(widths(float(every[-1]))) > target * whole:
        least = size(widths(float(every[-1]))) / whole
        by = f" by multiples of {round_to}" if round_to > 1 else ""
        raise InputError(f"target {target}: the sites can't bring the network below {least:.3f} of its size{by}")
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(widths(float(every[middle]))) <= target * whole else (middle + 1, high)
    return widths(float(every[low]))


def listing(sites: Sequence[Site]) -> str:
    """The sites' names and widths, in one line."""
    return ", ".join(f"{site.name} ({site.width})" for site in sites) or "no sites"
