"""Heads turned before they are cut, so that what is cut says least; an exact change of the network, without a gradient.

Of a head only the products of queries and keys, and of values and what reads them, say something, and these are
low-rank maps. By Eckart and Young (1936) a truncated singular value decomposition is the best map of its rank, if
queries and keys are independent; so each side is multiplied by what makes singular values of its dimensions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.columns import rows_of
from nm_lightning.compression.structure.copies import with_data
from nm_lightning.compression.structure.inputs import Inputs, call, clone
from nm_lightning.compression.structure.plan import named_tensors
from nm_lightning.compression.structure.sites import Pair, Site

TINY = 1e-7  # of a Gram matrix' mean diagonal, added to its diagonal: any invertible matrix leaves the network as it is


@torch.no_grad()
def turned(subject: Subject, sites: Sequence[Site], keeps: Mapping[str, Tensor]) -> nn.Module:
    """The network in evaluation mode, its heads turned so that the survivors say most: the same function.

    Args:
        subject: the network and its images.
        sites: those that shrink.
        keeps: by site, the survivors `(k,)`; which they are plays no part, only how many of each head.
    """
    pairs = [(pair, keeps[site.name]) for site in sites for pair in site.pairs]
    if not pairs:
        return subject.evaluated
    every = [pair for site in subject.sites for pair in site.pairs]
    key = "moments of heads", *(pair.maker for pair in every)
    moments = subject.once(key, lambda: moments_of(subject.evaluated, every, subject.batches, subject.ranks))
    result = with_data(subject.evaluated)
    tensors = named_tensors(result)
    for pair, keep in pairs:
        first, second = moments[pair.maker, pair.other]
        if pair.dim:
            weight = tensors[f"{pair.other}.weight"][:, pair.places].permute(1, 2, 0)  # (heads, d, out)
            maps = values_and_reader(second, weight.double())
        else:
            maps = queries_and_keys(first, second)
        order = torch.argsort(~torch.isin(pair.neurons, keep), dim=1, stable=True)[:, None]  # survivors get the first
        ours, theirs = (each.scatter(2, order.to(each.device).expand_as(each), each) for each in maps)
        for name in rows_of(pair.maker, tensors):
            turn(tensors[name], pair.rows, ours)
        for name in rows_of(pair.other, tensors) if pair.dim == 0 else []:
            turn(tensors[name], pair.places, theirs)
        if pair.dim:
            turn(tensors[f"{pair.other}.weight"].T, pair.places, theirs)
    return result


def turn(tensor: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Multiply each head's `rows` `(heads, d)` by the transpose of its matrix `(heads, d, d)`, in place."""
    old = tensor[rows].double()
    tensor[rows] = torch.einsum("hij,hi...->hj...", matrix, old).to(tensor.dtype)


def queries_and_keys(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """`U` and `V` `(heads, d, d)` with `U V^T = 1`, in whose columns products of queries and keys say less and less.

    `U = G_q^-1/2 P S^1/2`, `V = G_k^-1/2 T S^1/2` with `G_q^1/2 G_k^1/2 = P S T^T`: of all pairs of `r` columns their
    first `r` lose least of `q^T k` in the mean square.

    Args:
        queries: `G_q`, their second moments `(heads, d, d)`.
        keys: `G_k`, those of the keys.
    """
    (half, inverse), (other, its) = roots(queries), roots(keys)
    left, values, right = torch.linalg.svd(half @ other)
    values = values.sqrt()[:, None]
    return inverse @ left * values, its @ right.mT * values


def values_and_reader(mixed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`U` and `V` `(heads, d, d)` with `U V^T = 1`, in whose columns values, mixed and read, say less and less.

    `U = G^-1/2 T`, `V = G^1/2 T` with `W G^1/2 = P S T^T`.

    Args:
        mixed: `G`, the covariance of what the reader reads `(heads, d, d)`.
        weight: the reader's columns, `W^T` `(heads, d, out)`.
    """
    half, inverse = roots(mixed)
    read = half @ weight
    right = torch.linalg.eigh(read @ read.mT).eigenvectors.flip(-1)
    return inverse @ right, half @ right


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots of symmetric matrices `(heads, d, d)`, and their inverses."""
    values, vectors = torch.linalg.eigh(moments)
    mean = values.clamp(min=0).mean(dim=-1, keepdim=True)
    values = (values.clamp(min=0) + TINY * mean + torch.finfo(values.dtype).tiny).sqrt()[:, None]
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


def moments_of(
    network: nn.Module, pairs: Sequence[Pair], batches: Sequence[Inputs], ranks: Ranks
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """By pair, the second moments `(heads, d, d)` of its two sides over all ranks' images, in float64.

    Keys are centred within each image where a softmax follows, what a layer reads over all images.
    """
    sums: dict[tuple, list[Tensor]] = {}
    handles = []

    def add(key: tuple, entries: Tensor, centred: bool) -> None:
        if centred and entries.ndim > 3:
            entries = entries - entries.mean(dim=tuple(range(1, entries.ndim - 2)), keepdim=True)
        entries = entries.flatten(0, -3).double()
        new = torch.einsum("nhi,nhj->hij", entries, entries), entries.sum(dim=0), entries.new_tensor(len(entries))
        sums[key] = [old + own for old, own in zip(sums[key], new, strict=True)] if key in sums else list(new)

    def watch(pair: Pair) -> None:
        key = pair.maker, pair.other

        def made(layer: nn.Module, args: tuple, output: Tensor) -> None:
            add((*key, 0), output[..., pair.rows], False)

        def made_too(layer: nn.Module, args: tuple, output: Tensor) -> None:
            add((*key, 1), output[..., pair.places], pair.centred)

        def read(layer: nn.Module, args: tuple) -> None:
            add((*key, 1), args[0][..., pair.places], False)

        other = network.get_submodule(pair.other)
        if pair.dim:
            handles.append(other.register_forward_pre_hook(read))
        else:
            handles.append(network.get_submodule(pair.maker).register_forward_hook(made))
            handles.append(other.register_forward_hook(made_too))

    for pair in pairs:
        watch(pair)
    try:
        for batch in batches:
            call(network, clone(batch))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for pair in pairs:
        sides = []
        for side in (1,) if pair.dim else (0, 1):
            gram, total, count = ranks.total(*sums[pair.maker, pair.other, side])
            mean = total / count
            lost = mean[:, :, None] * mean[:, None] if pair.dim else 0
            sides.append(gram / count - lost)
        found[pair.maker, pair.other] = sides[0], sides[-1]
    return found
