"""One map from the survivors to all neurons of a site, shared by its consumers (GRAIL, Tang et al., CPAL 2026)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nm_lightning.compression.statistics.subject import Subject
from nm_lightning.compression.structure.decomposition import Decomposition, Scaling
from nm_lightning.compression.structure.inputs import call, clone
from nm_lightning.compression.structure.operations import CONVOLUTIONS, SOLVABLE
from nm_lightning.compression.structure.sites import Site


def by_channel(subject: Subject, keeps: Mapping[str, Tensor], ridge: float, method: str) -> Decomposition:
    """A ridge map for each site whose first consumer tells what its neurons are on the images."""
    found = Decomposition.pruned(subject.sites, keeps, method)
    sites = []
    for site, row, _ in found.shrinking(subject.sites):
        if not site.consumers:
            row.note = "pruned, not reconstructed: no layer reads it"
            continue
        first = site.consumers[0]
        readable = isinstance(subject.layers.get(first.name), SOLVABLE)
        if readable and all(consumer.groups == 1 and consumer.even(site.width) for consumer in site.consumers):
            sites.append(site)
        else:
            row.note = f"pruned, not reconstructed: {first.name} reads it in groups, or is no layer of its own"
    grams = gram_matrices(subject, sites)
    for site in sites:
        if site.name in grams:
            keep = found.keeps[site.name]
            (gram,) = subject.ranks.total(grams[site.name])
            matrix = channel_map(gram, keep.to(gram.device), ridge)
            found.scalings += [Scaling(consumer, keep, matrix) for consumer in site.consumers]
    return found


@torch.no_grad()
def gram_matrices(subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
    """By site, the Gram matrix `(n, n)` of its neurons over this rank's images, in float64."""
    network, grams, handles = subject.evaluated, {}, []
    for site in sites:

        def add(layer: nn.Module, args: tuple, kwargs: dict, site: Site = site) -> None:
            positions = site.consumers[0].positions()
            dim = 1 if isinstance(layer, CONVOLUTIONS) else -1
            images = args[0] if args else kwargs["input"]
            entries = images.movedim(dim, -1).flatten(0, -2)[:, positions]  # (entries, n, positions of each)
            entries = entries.transpose(1, 2).flatten(0, 1)
            grams[site.name] = grams.get(site.name, 0.0) + (entries.T @ entries).double()

        handles.append(network.get_submodule(site.consumers[0].name).register_forward_pre_hook(add, with_kwargs=True))
    try:
        for batch in subject.batches:
            call(network, clone(batch))
    finally:
        for handle in handles:
            handle.remove()
    return grams


def channel_map(gram: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """The ridge map from the survivors to all neurons, `(n, k)`: `G[:, keep] (G[keep, keep] + r I)^-1`.

    One map for all consumers, from the neurons' Gram matrix `(n, n)` (GRAIL, CPAL 2026).

    >>> channel_map(torch.eye(3).double(), torch.tensor([0, 2]), 0.0)
    tensor([[1., 0.],
            [0., 0.],
            [0., 1.]])
    """
    gram = gram.double()
    inner = gram[keep][:, keep]
    inner = inner + torch.eye(len(keep), dtype=gram.dtype, device=gram.device) * (
        ridge * inner.diagonal().mean() + torch.finfo(gram.dtype).tiny
    )
    return torch.linalg.solve(inner, gram[keep]).T.float()
