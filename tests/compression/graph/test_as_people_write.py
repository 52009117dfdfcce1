"""Networks as people write them: they shrink to the widths that are named, and the narrow one is the masked one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, trace
from tests.networks import Graph, conv
from tests.oracles import masked

IMAGE, TOKENS = (2, 3, 8, 8), (2, 6, 12)
CASES = {}


def case(shape, scope="all", **widths):
    """Register a network's builder, its input's shape, and the widths at ratio 0.5 (`__` stands for a dot)."""

    def register(builder):
        CASES[builder.__name__] = builder, shape, scope, {name.replace("__", "."): n for name, n in widths.items()}
        return builder

    return register


@case(TOKENS, "hidden", encoder__layers__0__linear1=16, encoder__layers__1__linear1=16)
def torchs_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)

    def forward(n, x):
        padding = x.new_zeros(x.shape[:2], dtype=torch.bool)  # with which torch would nest its tensors
        return n.fc(n.encoder(n.embed(x), src_key_padding_mask=padding).mean(1))

    return Graph(forward, embed=nn.Linear(12, 16), encoder=encoder, fc=nn.Linear(16, 4))


@case(TOKENS, "hidden", encoder__linear1=10, decoder__linear1=10)
def torchs_decoder():
    return Graph(lambda n, x: n.fc(n.decoder(n.embed(x[:, :4]), n.encoder(n.embed(x)))), embed=nn.Linear(12, 16),
                 encoder=nn.TransformerEncoderLayer(16, 4, 20, batch_first=True),
                 decoder=nn.TransformerDecoderLayer(16, 4, 20, batch_first=True), fc=nn.Linear(16, 4))  # fmt: skip


class SquareHeads(nn.Module):
    """As many heads as each is long, and keys that several of them share."""

    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 4, 2, 4
        self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out, self.fc = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        n, tokens, _ = x.shape
        q = self.q(x).view(n, tokens, self.heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(n, tokens, self.kv_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return self.fc(self.out(mixed.reshape(n, tokens, -1)).mean(1))


@case(TOKENS, q=1)
def as_many_heads_as_each_is_long():
    return SquareHeads()


class LinearAttention(nn.Module):
    """Without a softmax, in products of three."""

    def __init__(self):
        super().__init__()
        self.heads, self.q, self.k, self.v = 4, nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 24)
        self.fc = nn.Linear(24, 4)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums, scale = torch.einsum("...nhd,...nhe->...hde", k, v), 1 / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        return self.fc(torch.einsum("bnhd,bhde,bnh->bnhe", q, sums, scale).flatten(2).mean(1))


@case(TOKENS, q=2)
def products_of_three():
    return LinearAttention()


@case(IMAGE, a=8, b=6)
def einsum_of_one_and_without_a_sum():
    return Graph(lambda n, x: n.fc(n.b(torch.einsum("bchw,bc->bchw", y := n.a(x).relu(), n.gate(
                     torch.einsum("b...hw->b...", y)).sigmoid())).mean((2, 3))),
                 a=conv(3, 16), gate=nn.Linear(16, 16), b=conv(16, 12), fc=nn.Linear(12, 4))  # fmt: skip


@case(IMAGE, a=8, b=6)
def compared_chosen_and_filled():
    def forward(n, x):
        x = n.a(x)
        x = torch.where(x > 0, x, torch.zeros_like(x))
        y = n.b(x)
        return n.fc(torch.maximum(y.masked_fill(y < 0, 0.5), y.log1p().nan_to_num()).mean((2, 3)))

    return Graph(forward, a=conv(3, 16), b=conv(16, 12), fc=nn.Linear(12, 4))


class Rounded(torch.autograd.Function):
    """Its gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 4).mul(4).round().div(4)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@case(IMAGE, a=8, b=6)
def rounded_with_a_gradient():
    return Graph(lambda n, x: n.fc(Rounded.apply(n.b(Rounded.apply(n.a(x)))).mean((2, 3))),
                 a=conv(3, 16), b=conv(16, 12), fc=nn.Linear(12, 4))  # fmt: skip


@case(IMAGE, a=4, b=5, c=3)
def gates_and_the_largest():
    def forward(n, x):
        x = n.b(F.glu(n.a(x), dim=1))
        x, _ = n.c(nn.functional.relu(x)).max(dim=-1)
        return n.fc(torch.max(x, 2, keepdim=True)[0].flatten(1))

    return Graph(forward, a=conv(3, 16), b=conv(8, 10), c=conv(10, 6), fc=nn.Linear(6, 4))


class Blur(nn.Module):
    """A filter that is no layer's, for each channel."""

    def __init__(self, channels, counts):
        super().__init__()
        self.channels, self.counts = channels, counts
        self.register_buffer("filter", torch.full((channels, 1, 3, 3), 1 / 9))

    def forward(self, x):
        groups = self.channels if self.counts else x.shape[1]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filter, stride=2, groups=groups)


@case(IMAGE, **{"0": 8, "3": 6})
def blurred():
    return nn.Sequential(conv(3, 16), nn.ReLU(), Blur(16, False), conv(16, 12), Blur(12, True), nn.Flatten(),
                         nn.Linear(48, 4))  # fmt: skip


@case((2, 12), **{"0": 8, "3": 4})
def a_decoder_that_unflattens():
    return nn.Sequential(nn.Linear(12, 144), nn.ReLU(), nn.Unflatten(1, (16, 3, 3)), nn.ConvTranspose2d(16, 8, 2, 2),
                         nn.ReLU(), conv(8, 3))  # fmt: skip


class ComplexRotary(nn.Module):
    """A rotary embedding by complex numbers."""

    def __init__(self):
        super().__init__()
        self.heads, self.q, self.k, self.v = 4, nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24)
        self.fc = nn.Linear(24, 4)
        turns = torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1, 0.01]))
        self.register_buffer("turns", torch.polar(torch.ones_like(turns), turns), persistent=False)

    def turned(self, x):
        numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * self.turns[: x.shape[2]]).flatten(3).type_as(x)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.fc(mixed.transpose(1, 2).flatten(2).mean(1))


@case(TOKENS, q=2)
def rotary_by_complex_numbers():
    return ComplexRotary()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_is_cut_right(name):
    torch.manual_seed(0)
    builder, shape, scope, widths = CASES[name]
    model, x = builder().eval(), torch.randn(shape)
    found = trace(model, x, scope)
    assert torch.equal(compress(model, x, ratio=0, scope=scope).model(x), model(x))
    result = compress(model, x, "prune", ratio=0.5, scope=scope)
    assert {name: result.report.widths.get(name) for name in widths} == widths, found.skipped
    torch.testing.assert_close(result.model(x), masked(model, result, found.sites)(x), rtol=1e-5, atol=1e-5)
    assert result.model(x[:1]).shape == model(x[:1]).shape


def test_a_stream_through_torchs_encoder_shrinks_by_whole_heads():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(96, 4)).eval()
    result = compress(model, torch.randn(TOKENS), "prune", ratio=0.5, scope="all")
    assert result.report.widths == {"0": 2, "1.layers.0.linear1": 16, "1.layers.1.linear1": 16}
    attention = result.model[1].layers[0].self_attn
    assert (attention.num_heads, attention.embed_dim) == (2, 8)
    with torch.no_grad():
        assert result.model(torch.randn(3, 6, 12)).isfinite().all()
