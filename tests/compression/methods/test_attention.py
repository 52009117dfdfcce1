"""Attention in closed form: heads are turned, then cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nm_lightning
from nm_lightning import compress, trace
from nm_lightning.compression.methods.attention import queries_and_keys, roots, values_and_reader

WIDTH, HEADS, DIM, TOKENS = 20, 3, 8, 7


class Block(nn.Module):
    """One attention as people write it, in a stream."""

    def __init__(self, kind="fused"):
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.attn_dim = kind, HEADS, DIM, HEADS * DIM
        self.scale = DIM**-0.5
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        if kind in ("separate", "rotary", "free"):
            self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        else:
            self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM, bias=kind != "no bias")
        if kind == "normed":
            self.norm = nn.LayerNorm(DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)
        self.register_buffer("angles", torch.linspace(0, 1, TOKENS)[:, None] * torch.arange(1.0, 1 + DIM // 2))

    def rotated(self, x):
        first, second = x.chunk(2, dim=-1)
        sin, cos = self.angles.sin(), self.angles.cos()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, _ = x.shape
        if self.kind in ("separate", "rotary", "free"):
            length = -1 if self.kind == "free" else self.head_dim
            q, k, v = (
                each(x).view(batch, tokens, self.num_heads, length).transpose(1, 2) for each in (self.q, self.k, self.v)
            )
        else:
            q, k, v = (
                self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            )
        if self.kind == "rotary":
            q, k = self.rotated(q), self.rotated(k)
        if self.kind == "normed":
            q, k = self.norm(q), self.norm(k)
        if self.kind in ("by hand", "free"):
            mixed = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, -1 if self.kind == "free" else self.attn_dim)
        return self.head((x + self.proj(mixed)).mean(1))


KINDS = ["fused", "no bias", "by hand", "separate", "free"]


def make(kind="fused", seed=0):
    torch.manual_seed(seed)
    return Block(kind).eval(), torch.randn(96, TOKENS, 5)


def parts(model):
    """The rows of queries, keys and values: weights `(heads, d, width)` and biases."""
    if hasattr(model, "qkv"):
        weights = model.qkv.weight.view(3, HEADS, DIM, WIDTH).unbind(0)
        return list(weights), model.qkv.bias.view(3, HEADS, DIM).unbind(0) if model.qkv.bias is not None else []
    layers = (model.q, model.k, model.v)
    return [each.weight.view(HEADS, DIM, WIDTH) for each in layers], [each.bias.view(HEADS, DIM) for each in layers]


@torch.no_grad()
def lower_ranks(model, rank):
    """Queries and values of each head lie in `rank` dimensions, which are no coordinates."""
    weights, biases = parts(model)
    for place in (0, 2):
        basis = torch.linalg.qr(torch.randn(HEADS, DIM, rank)).Q
        onto = basis @ basis.mT
        weights[place].copy_(onto @ weights[place])
        if len(biases):
            biases[place].copy_((onto @ biases[place][..., None])[..., 0])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_low_rank_lose_nothing(kind):
    model, x = make(kind)
    lower_ranks(model, DIM // 2)
    result = compress(model, x[:2], "reconstruct", ratio=0.5, attention="dimensions", calibration=x)
    assert not set(result.report.skipped) & {site.name for site in result.sites}
    small = result.model
    made = (
        small.qkv.out_features
        if hasattr(small, "qkv")
        else sum(each.out_features for each in (small.q, small.k, small.v))
    )
    assert (made, small.proj.in_features) == (3 * HEADS * DIM // 2, HEADS * DIM // 2)
    new = torch.randn(32, TOKENS, 5)
    assert torch.allclose(small(new), model(new), atol=1e-4)
    pruned = compress(model, x[:2], "prune", ratio=0.5, attention="dimensions", calibration=x).model
    assert (pruned(new) - model(new)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_prune_leaves_the_masked_network(kind):
    model, x = make(kind)
    small = compress(model, x[:2], "prune", ratio=0.25, attention="dimensions")
    with torch.no_grad():
        for site in small.sites:
            for pair in site.pairs:
                gone = pair.gone(small.keep[site.name])
                layer = model.get_submodule(pair.maker)
                layer.weight[gone] = 0
                if layer.bias is not None:
                    layer.bias[gone] = 0
    assert torch.allclose(small.model(x), model(x), atol=1e-6)


def test_ratio_0_keeps_the_bits_and_turned_heads_the_function():
    model, x = make()
    assert torch.equal(
        compress(model, x[:2], "reconstruct", ratio=0, attention="dimensions", calibration=x).model(x), model(x)
    )
    moments = [each @ each.mT for each in torch.randn(3, HEADS, DIM, 2 * DIM).double()]
    for first, second in (
        queries_and_keys(*moments[:2]),
        values_and_reader(moments[2], torch.randn(HEADS, DIM, 5).double()),
    ):
        assert torch.allclose(first @ second.mT, torch.eye(DIM).double().expand(HEADS, -1, -1), atol=1e-9)


def test_products_lose_least():
    """The mean square of what `r` columns lack of independent `q^T k` is the tail of the singular values."""
    torch.manual_seed(0)
    queries, keys = (torch.randn(1, DIM, DIM, dtype=torch.double) for _ in range(2))
    gq, gk = queries @ queries.mT, keys @ keys.mT
    u, v = queries_and_keys(gq, gk)
    values = torch.linalg.svdvals(roots(gq)[0] @ roots(gk)[0])[0]

    def lost(kept):
        lack = torch.eye(DIM).double() - kept
        return float((lack.mT @ gq @ lack @ gk).diagonal(dim1=-2, dim2=-1).sum())

    for rank in range(1, DIM):
        turned = lost(u[0, :, :rank] @ v[0, :, :rank].mT)
        assert turned == pytest.approx(float(values[rank:].square().sum()), rel=1e-2)
        chosen = [lost(torch.diag(torch.isin(torch.arange(DIM), torch.tensor(keep)).double())) for keep in
                  torch.combinations(torch.arange(DIM), rank).tolist()]  # fmt: skip
        assert turned < min(chosen)


def test_what_values_lose_in_the_mean_goes_into_the_bias():
    model, x = make()
    with torch.no_grad():
        weights, biases = parts(model)
        weights[2].zero_()  # constant values
        biases[2].normal_()
    small = compress(model, x[:2], "reconstruct", ratio=0.75, attention="dimensions", calibration=x).model
    assert torch.allclose(small(x), model(x), atol=1e-4)


def test_queries_and_keys_apart_from_values_where_the_code_lets_them():
    model, x = make("free")
    sites = {site.name: site for site in trace(model, x[:2], attention="dimensions").sites}
    assert sites["q"].width == sites["v"].width == HEADS * DIM and not sites["q"].consumers
    result = compress(model, x[:2], "reconstruct", widths={"q": 6, "v": 18}, attention="dimensions", calibration=x)
    assert (result.model.q.out_features, result.model.k.out_features, result.model.v.out_features) == (6, 6, 18)


@pytest.mark.parametrize("kind", ["rotary", "normed"])
def test_what_lies_between_leaves_whole_heads_as_before(kind):
    model, x = make(kind)
    found, before = (trace(model, x[:2], attention=each) for each in ("dimensions", "heads"))
    assert [(site.name, site.width) for site in found.sites] == [(site.name, site.width) for site in before.sites]
    assert found.skipped == before.skipped and not any(site.pairs for site in found.sites)


def test_saved_and_loaded_with_the_same_bits(tmp_path):
    model, x = make()
    result = compress(model, x[:2], "reconstruct", ratio=0.5, attention="dimensions", calibration=x)
    nm_lightning.save(result, tmp_path / "small.ckpt")
    other, _ = make(seed=1)
    assert torch.equal(nm_lightning.load(tmp_path / "small.ckpt", into=other).eval()(x), result.model(x))


def test_whole_heads_are_reconstructed():
    model, x = make()
    small = compress(model, x[:2], "reconstruct", ratio=0.3, calibration=x).model
    pruned = compress(model, x[:2], "prune", ratio=0.3).model
    assert small.num_heads == 2 and (small(x) - model(x)).norm() < 0.5 * (pruned(x) - model(x)).norm()


def test_a_refit_does_not_turn_heads_back():
    """What was turned is not compared with the original's rows; the layers before and behind it gain."""
    block, x = make()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 5), block).eval()
    settings = {"ratio": 0.5, "attention": "dimensions", "calibration": x}
    plain, fitted = (compress(model, x[:2], "reconstruct", refit=rounds, **settings) for rounds in (0, 1))
    assert not any("left away" in note for note in fitted.report.notes)
    assert not torch.equal(plain.model[0].weight, fitted.model[0].weight)
    assert torch.equal(plain.model[3].qkv.weight, fitted.model[3].qkv.weight)
    lost = [(each.model(x) - model(x)).norm() for each in (plain, fitted)]
    assert lost[1] < lost[0]
