"""Second room: which neurons stay (a criterion), and how many (a budget)."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from nm_lightning.compression.sites import Site
from nm_lightning.errors import InputError

Rounding = Callable[[int, float], int]


def l1_norm(vectors: Tensor) -> Tensor:
    """Sum of absolute weights of each neuron: `(n, d)` to `(n,)` (Li et al., ICLR 2017)."""
    return vectors.abs().sum(dim=1)


def l2_norm(vectors: Tensor) -> Tensor:
    """Euclidean norm of each neuron: `(n, d)` to `(n,)` (He et al., IJCAI 2018)."""
    return vectors.norm(dim=1)


def l2_geometric_median(vectors: Tensor) -> Tensor:
    """Sum of Euclidean distances to all other neurons: `(n, d)` to `(n,)` (FPGM, He et al., CVPR 2019).

    Neurons near the geometric median have small sums: the others can stand in for them.
    """
    return torch.cdist(vectors.double(), vectors.double()).sum(dim=1)


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "l1-norm": l1_norm,
    "l2-norm": l2_norm,
    "l2-GM": l2_geometric_median,
}


def survivors(scores: Tensor, width: int, cells: Tensor | None = None) -> Tensor:
    """The indices of the `width` largest scores, ascending; among equal scores the first neurons stay.

    Args:
        scores: `(n,)`.
        width: how many stay.
        cells: `(n,)`, the cell of each neuron, all equally large; equally many stay in each. None for one cell.

    >>> survivors(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)
    tensor([0, 2])
    >>> survivors(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2, cells=torch.tensor([0, 1, 0, 1]))
    tensor([0, 3])
    """
    order = torch.argsort(scores, descending=True, stable=True)
    count = 1
    if cells is not None:
        order, count = order[torch.argsort(cells[order], stable=True)], int(cells.max()) + 1
    return order.view(count, -1)[:, : width // count].flatten().sort().values


def keep_of(site: Site, scores: Tensor, width: int) -> Tensor:
    """The site's survivors, ascending: the best `width`, or a few more where a layer would lose all its neurons.

    Args:
        site: whose cells keep equally many neurons each.
        scores: `(site.width,)`.
        width: a multiple of `site.step`.
    """
    scores = scores.clone()
    for member in site.producers:  # each layer keeps its best
        owned = member.owner[member.owner >= 0].unique()
        scores[owned[scores[owned].argmax()]] += scores.abs().max() * 2 + 1
    while True:
        keep = survivors(scores, width, site.cells)
        if width == site.width or all(torch.isin(member.owner, keep).any() for member in site.producers):
            return keep
        width += site.step


def floor(neurons: int, ratio: float) -> int:
    """`floor(n (1 - r))`, at least 1; a product that is whole but for rounding counts as whole.

    >>> floor(20, 0.9), floor(16, 0.3), floor(2, 0.9)
    (2, 11, 1)
    """
    return max(1, int(round(neurons * (1 - ratio), 9)))


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
            raise InputError(f"sites {pattern!r} matches none of: {_listing(sites)}")
    return [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]


def budget(
    sites: Sequence[Site],
    ratio: float = 0.0,
    widths: Sequence[int] | Mapping[str, int] | None = None,
    rounding: Rounding = floor,
) -> dict[str, int]:
    """How many neurons stay at each site.

    Args:
        sites: the sites to compress.
        ratio: the share of neurons to remove, in [0, 1).
        widths: the survivors themselves: one integer for each site in order, or by name (the other sites then
            follow `ratio`).
        rounding: `(neurons, ratio)` to the number of survivors.

    Returns:
        The number of survivors by site name.

    Raises:
        InputError: a ratio outside [0, 1), or widths that don't fit the sites.
    """
    check_ratio(ratio)
    counts = {site.name: rounding(site.width, ratio) if ratio else site.width for site in sites}
    for site in sites:
        counts[site.name] = max(site.step, counts[site.name] // site.step * site.step)
    if isinstance(widths, Mapping):
        unknown = [name for name in widths if name not in counts]
        if unknown:
            raise InputError(f"widths name the site {unknown[0]!r}, which is none of: {_listing(sites)}")
        counts |= widths
    elif widths is not None:
        if len(widths) != len(sites):
            raise InputError(f"{len(widths)} widths for {len(sites)} sites: {_listing(sites)}")
        counts = {site.name: width for site, width in zip(sites, widths, strict=True)}
    for site in sites:
        count = counts[site.name]
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= site.width:
            raise InputError(f"width {count!r} for {site.name}: give a whole number from 1 to {site.width}")
        if count % site.step:
            raise InputError(f"width {count} for {site.name}: its groups ask for a multiple of {site.step}")
    return counts


def share_cut(
    sites: Sequence[Site],
    costs: Mapping[str, Tensor],
    size: Callable[[Mapping[str, int]], int],
    target: float,
) -> dict[str, int]:
    """Widths that bring a network to a share of its size where it costs least.

    One price per parameter (or MAC) for all sites: each gives up neurons as long as the next one costs less than the
    price of what goes with it. The price is found by bisection.

    Args:
        sites: the sites; those without costs keep their width.
        costs: by site, what each further removal costs, `(n - step,)`; a cheaper one behind a dearer one costs as much.
        size: of a network with given widths.
        target: share of the size that may stay, in (0, 1).

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
    steps = {site.name: site.step for site in sites}

    def widths(price: float) -> dict[str, int]:
        cut = {name: int((each <= price).sum()) // steps[name] * steps[name] for name, each in prices.items()}
        return full | {name: full[name] - count for name, count in cut.items()}

    every = torch.cat([torch.zeros(1, dtype=torch.double), *prices.values()]).unique()
    if size(widths(float(every[-1]))) > target * whole:
        least = size(widths(float(every[-1]))) / whole
        raise InputError(f"target {target}: the sites can't bring the network below {least:.3f} of its size")
    low, high = 0, len(every) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(widths(float(every[middle]))) <= target * whole else (middle + 1, high)
    return widths(float(every[low]))


def check_target(name: str, target: float) -> None:
    """Raise `InputError` unless `target` is a number between 0 and 1."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < 1:
        raise InputError(f"target_{name} {target!r}: give the share that may stay, a number between 0 and 1")


def check_ratio(ratio: float) -> None:
    """Raise `InputError` unless `ratio` is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise InputError(f"ratio {ratio!r}: give a number from 0 (keep all) to below 1")


def _listing(sites: Sequence[Site]) -> str:
    return ", ".join(f"{site.name} ({site.width})" for site in sites) or "no sites"
