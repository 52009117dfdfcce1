"""Blocks as published networks have them, written anew: they shrink, and the narrow one is the masked one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, trace
from tests.networks import Graph, conv
from tests.oracles import masked

IMAGE = (2, 3, 8, 8)


class TalkingHeads(nn.Module):
    """One number of heads for queries and keys, and, behind layers that mix heads, for values."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.inner = 4, 24
        self.q, self.k, self.v = conv(12, 12, 1), conv(12, 12, 1), conv(12, 24, 1)
        self.before, self.behind = conv(4, 4, 1), conv(4, 4, 1)
        self.out = conv(24, 12, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (layer(x).reshape(n, self.num_heads, -1, h * w) for layer in (self.q, self.k, self.v))
        mixed = v @ self.behind(self.before(q.mT @ k).softmax(-1)).mT
        return self.out(mixed.reshape(n, self.inner, h, w))


class Outlook(nn.Module):
    """Weights for the windows of an image, by which these are added up again; heads of a length that is known."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 5
        self.v, self.weights = conv(12, 20, 1), nn.Linear(12, 9 * 9 * 4)
        self.unfold, self.out = nn.Unfold(3, padding=1, stride=2), conv(20, 12, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        v = self.unfold(self.v(x)).reshape(n, self.num_heads, self.head_dim, 9, -1).permute(0, 1, 4, 3, 2)
        weights = self.weights(F.avg_pool2d(x, 2).permute(0, 2, 3, 1)).reshape(n, -1, self.num_heads, 9, 9)
        mixed = weights.permute(0, 2, 1, 3, 4).softmax(-1) @ v
        windows = mixed.permute(0, 1, 4, 3, 2).flatten(1, 3)
        mixed = F.fold(windows, (h, w), 3, padding=1, stride=2).flatten(2)
        return self.out(mixed.reshape(n, self.num_heads * self.head_dim, h, w))


class Rotary(nn.Module):
    """A head's dimensions are turned in pairs, by a table for each token and dimension; whole heads can go."""

    def __init__(self, half):
        super().__init__()
        self.num_heads, self.half = 4, half
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)
        self.register_buffer("table", torch.randn(64, 2 * 4))

    def turn(self, x):
        sin, cos = self.table.chunk(2, -1)
        if self.half:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin

    def forward(self, x):
        tokens = x.flatten(2).mT
        n, count, _ = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.out(mixed.transpose(1, 2).reshape(n, count, -1)).mT.reshape(x.shape)


class OneHead(nn.Module):
    """A single head, which gets shorter: of queries and keys by itself, of values as the stream does."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 1, 12
        self.q, self.kv, self.out = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)

    def forward(self, x):
        tokens = x.flatten(2).mT
        n, count, channels = tokens.shape
        q = self.q(tokens).reshape(n, count, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).reshape(n, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, channels)
        return self.out(mixed).mT.reshape(x.shape)


class HeadsLast(nn.Module):
    """The number of channels is the stream's, and heads lie behind the dimensions when they are put together."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        tokens = x.flatten(2).mT
        n, count, channels = tokens.shape
        qkv = self.qkv(tokens).reshape(n, count, 3, self.num_heads, channels // self.num_heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.out(mixed.permute(0, 2, 3, 1).reshape(n, count, channels)).mT.reshape(x.shape)


def in_a_stream(block):
    """With a layer before it and behind it."""
    return Graph(lambda n, x: n.fc((F.relu(y := n.a(x)) + n.block(y)).mean((2, 3))),
                 a=conv(3, 12), block=block, fc=nn.Linear(12, 4))  # fmt: skip


BLOCKS = {
    "talking heads": (in_a_stream(TalkingHeads()), {"a": 6, "block.q": 6, "block.before": 2, "block.v": 12}),
    "outlook attention": (in_a_stream(Outlook()), {"a": 6, "block.v": 10}),
    "one head": (in_a_stream(OneHead()), {"a": 6, "block.q": 6, "block.kv": 12}),
    "heads last": (in_a_stream(HeadsLast()), {"a": 6, "block.qkv": 18}),
    "rotary by halves": (in_a_stream(Rotary(True)), {"a": 6, "block.qkv": 24}),
    "rotary by neighbours": (in_a_stream(Rotary(False)), {"a": 6, "block.qkv": 24}),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_published_block_is_cut_right(name):
    torch.manual_seed(0)
    model, widths = BLOCKS[name]
    model.eval()
    x = torch.randn(IMAGE)
    found = trace(model, x, "all")
    assert torch.equal(compress(model, x, ratio=0, scope="all").model(x), model(x))
    result = compress(model, x, "prune", ratio=0.5, scope="all")
    made = {layer: len(result.model.get_submodule(layer).weight) for layer in widths}
    assert made == widths, found.skipped
    silent = masked(model, result, found.sites)
    for pair, keep in [(pair, result.keep[site.name]) for site in found.sites for pair in site.pairs]:
        maker = silent.get_submodule(pair.maker)
        maker.weight[pair.gone(keep)] = maker.bias[pair.gone(keep)] = 0
    torch.testing.assert_close(result.model(x), silent(x), rtol=1e-5, atol=1e-5)


def test_the_same_share_goes_of_each_part_of_a_stream_that_grew():
    """Whatever their weights say: 16 channels, and 32 that are put beside them and written to by a layer of both."""
    torch.manual_seed(0)
    model = Graph(lambda n, x: n.fc((y := torch.cat([y := n.a(x), n.b(y)], 1)).add(n.c(y.relu())).mean((2, 3))),
                  a=conv(3, 16), b=conv(16, 32), c=conv(48, 48), fc=nn.Linear(48, 4)).eval()  # fmt: skip
    with torch.no_grad():
        model.b.weight *= 100
    small = compress(model, torch.randn(IMAGE), "prune", "l1-norm", ratio=0.5, scope="all").model
    assert (small.a.out_channels, small.b.out_channels, small.c.out_channels) == (8, 16, 24)


def test_a_depthwise_layer_down_to_one_channel_is_still_one():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 2, groups=2), nn.ReLU(), conv(2, 4)).eval()
    small = compress(model, torch.randn(IMAGE), ratio=0.5).model
    assert (small[0].out_channels, small[2].groups, small[4].in_channels) == (1, 1, 1)
