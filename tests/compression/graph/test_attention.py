"""Attention as people write it: whole heads go, and exactly the dead ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, trace

WIDTH, HEADS, DIM, TOKENS = 24, 4, 6, 9


class Bias(nn.Module):
    """A bias for each head and pair of tokens, made from their distance by a method that is no forward."""

    def __init__(self):
        super().__init__()
        self.heads, self.shape, self.make = HEADS, (TOKENS, TOKENS, HEADS), nn.Linear(1, HEADS)
        self.register_buffer("places", torch.randint(7, (TOKENS * TOKENS,)))
        self.register_buffer("distances", torch.linspace(-1, 1, 7).view(7, 1, 1))

    def between_tokens(self):
        table = self.make(self.distances)
        return table.view(-1, self.heads)[self.places].view(self.shape).permute(2, 0, 1).unsqueeze(0)


class Heads(nn.Module):
    """A stream with one attention whose code differs from kind to kind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.num_heads = kind, HEADS
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=kind != "computed bias"), nn.Linear(WIDTH, WIDTH)
        if kind == "computed bias":
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
            self.register_buffer("k_bias", torch.zeros(WIDTH))
        if kind == "normalised":
            self.scale = nn.Parameter(torch.randn(HEADS, 1, 1))
        if kind == "a bias of another module":
            self.bias = Bias()
        self.table = nn.Parameter(torch.randn(7, HEADS))  # a bias for each head and relative position
        self.register_buffer("places", torch.randint(7, (TOKENS, TOKENS)))

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, channels = x.shape
        if self.kind == "computed bias":
            qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        else:
            qkv = self.qkv(x)
        length = channels // self.num_heads if self.kind == "share of the stream" else -1
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, length).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.kind == "a bias of another module":
            bias = self.bias.between_tokens()
        if self.kind == "share of the stream":
            q = q * (channels // self.num_heads) ** -0.5  # by hand, as torchvision's Swin does
        if self.kind == "normalised":
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.exp()
            mixed = (scores + bias).softmax(dim=-1) @ v
        else:
            scale = 1.0 if self.kind == "share of the stream" else None
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        shape = channels if self.kind == "share of the stream" else -1
        return self.head((x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, shape))).mean(1))


def make(kind):
    torch.manual_seed(0)
    return Heads(kind).eval(), torch.randn(2, TOKENS, 5)


@pytest.mark.parametrize("kind", ["last size", "computed bias", "normalised"])
@torch.no_grad()
def test_dead_heads_go_without_loss(kind):
    model, x = make(kind)
    dead = torch.tensor([1, 3])
    model.qkv.weight.view(3, HEADS, DIM, WIDTH)[:, dead] = 0
    for bias in (model.qkv.bias, getattr(model, "q_bias", None), getattr(model, "v_bias", None)):
        if bias is not None:
            bias.view(-1, HEADS, DIM)[:, dead] = 0
    result = compress(model, x, "prune", "l1-norm", sites=["qkv"], ratio=0.5)
    assert result.keep["qkv"].tolist() == [0, 2] and result.model.num_heads == 2
    assert result.model.table.shape == (7, 2) and result.model.proj.in_features == 2 * DIM
    assert torch.allclose(result.model(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["last size", "computed bias", "normalised", "share of the stream", "a bias of another module"]
)
@pytest.mark.parametrize("ratio", [0.5, 0.75])  # 0.75 leaves one head
def test_all_of_it_shrinks(kind, ratio):
    model, x = make(kind)
    result = compress(model, x, "prune", ratio=ratio, scope="all")
    assert set(result.report.skipped) == {"head"}
    assert result.model.num_heads == HEADS * (1 - ratio)
    assert result.model(x[:1]).shape == (1, 3)


def test_a_stream_whose_share_is_the_heads_length_shrinks_by_heads():
    model, x = make("share of the stream")
    (site,) = trace(model, x, "all").sites
    assert site.width == HEADS and {member.name for member in site.producers} == {"embed", "qkv", "proj"}
    assert not trace(model, x, "hidden").sites
