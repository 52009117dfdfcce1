"""Queries and keys with fewer dimensions: cut, selected and compensated as in CORP, or turned into singular vectors.

    python benchmarks/attention.py            # on checkpoints/vit_fashion_mnist, the full test set; a table on stdout

CORP (arXiv 2602.05243) keeps the dimensions with the most energy, `E[q_d^2] E[k_d^2]`, and has them say by least
squares what the removed ones said: `q_S (1 + M) k_S^T` with `M = Q_SS^-1 Q_SP K_PS K_SS^-1` of the second moments `Q`
and `K`. All three see the same moments of 1,024 training images; the code is this project's reading of the paper.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning import compress, trace
from nm_lightning.cli.sources import Asked, open_source
from nm_lightning.compression.methods.attention import moments_of, queries_and_keys, turn
from nm_lightning.compression.statistics.ranks import ALONE
from nm_lightning.measure import evaluate


def pruned(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`A` and `B` `(d, d)` that queries and keys are multiplied by: only the dimensions with the most energy stay."""
    stays = torch.zeros(len(queries), dtype=queries.dtype)
    stays[(queries.diagonal() * keys.diagonal()).topk(rank).indices] = 1
    return stays.diag(), stays.diag()


def selected(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same, and they say what the others said."""
    order = (queries.diagonal() * keys.diagonal()).argsort(descending=True)
    stay, go = order[:rank], order[rank:]

    def share(moment: Tensor) -> Tensor:
        own = moment[stay][:, stay]
        return torch.linalg.solve(own + 1e-6 * own.diagonal().mean() * torch.eye(rank), moment[stay][:, go])

    ours, theirs = torch.zeros_like(queries), torch.zeros_like(keys)
    ours[stay, stay], theirs[stay, stay] = 1, 1
    ours[stay[:, None], stay] += share(queries) @ share(keys).T
    return ours, theirs


def singular(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of the products."""
    ours, theirs = (each[0] for each in queries_and_keys(queries[None], keys[None]))
    ours[:, rank:], theirs[:, rank:] = 0, 0
    return ours, theirs


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    source = open_source(Asked("vit_fashion_mnist"))
    network, data = source.network.eval(), source.loaders.data
    test = data.splits["test"]
    images, labels = data.normalise(test.images), test.labels
    seen = data.calibration_images("data", 1024, 0)
    wanted = network(images).log_softmax(-1)

    def row(what: str, ratio: float, how: str, small: nn.Module) -> None:
        accuracy = evaluate(small, list(zip(images.split(500), labels.split(500), strict=True)))
        lost = F.kl_div(small(images).log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        print(f"| {what} | {ratio} | {how} | {100 * accuracy:.2f} | {float(lost):.4f} |", flush=True)

    print("| what shrinks | ratio | how | accuracy % | nats an image |\n| --- | --- | --- | ---: | ---: |")
    row("nothing", 0, "", network)
    sites = trace(network, seen[:1], attention="dimensions").sites
    pairs = [pair for site in sites for pair in site.pairs if not pair.dim]
    found = moments_of(network, pairs, [seen], ALONE)
    original = {name: value.clone() for name, value in network.state_dict().items()}
    for ratio in (0.25, 0.5, 0.75):
        for how, name in ((pruned, "cut"), (selected, "selected, as CORP"), (singular, "singular vectors")):
            for pair in pairs:
                rank = pair.rows.shape[1] - int(ratio * pair.rows.shape[1])
                heads = [how(*sides, rank) for sides in zip(*found[pair.maker, pair.other], strict=True)]
                ours, theirs = map(torch.stack, zip(*heads, strict=True))
                for tensor in network.get_submodule(pair.maker).parameters():
                    turn(tensor, pair.rows, ours)
                    turn(tensor, pair.places, theirs)
            row("queries and keys", ratio, name, network)
            network.load_state_dict(original)
    for ratio in (0.25, 0.5):
        for name, given in {
            "cut": {"method": "prune"},
            "selected, one map for each site": {"method": "reconstruct", "reconstruction": "channel"},
            "reconstruct": {"method": "reconstruct"},
        }.items():
            given |= {"criterion": "l2-norm", "sites": ["*fc1"], "calibration": seen}
            row("hidden layers", ratio, name, compress(network, seen[:1], ratio=ratio, **given).model.eval())


if __name__ == "__main__":
    main()
