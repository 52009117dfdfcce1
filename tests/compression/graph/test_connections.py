"""A network for each kind of connection: its sites are found, and cut right."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, trace
from tests.networks import Attention, Graph, conv
from tests.oracles import masked


class EinsumAttention(Attention):
    """The same in Einstein's notation."""

    def __init__(self, width, heads, head_dim):
        super().__init__(width, heads, head_dim, fused=False)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (layer(x).view(batch, tokens, self.heads, self.head_dim) for layer in (self.q, self.k, self.v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.head_dim**-0.5).softmax(dim=-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class AsymmetricConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Functional(nn.Module):
    """Layers as bare parameters and functional calls."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(12, 3, 3, 3)), nn.Parameter(torch.randn(12))
        self.w2 = nn.Parameter(torch.randn(5, 12))
        self.scale, self.shift = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))
        self.register_buffer("mean", torch.randn(12))
        self.register_buffer("var", torch.rand(12) + 0.5)

    def forward(self, x):
        x = F.batch_norm(F.conv2d(x, self.w1, self.b1), self.mean, self.var, self.scale, self.shift)
        return F.linear(F.relu(x).mean((2, 3)), self.w2)


def shuffle(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 12)


def head(net, x):
    return net.fc(x.mean((2, 3)))


class Split(nn.Module):
    """Split by lengths that are attributes: of each part, of a list, of all and one, or twice of a half; or cut by one.

    Or by the length of another tensor, that the code expects to be what an attribute says.
    """

    def __init__(self, way):
        super().__init__()
        self.way, self.one, self.other, self.lengths, self.both = way, 6, 10, (6, 10), 16
        if way == "the rest":
            del self.other, self.lengths
        if way == "another":
            self.channels, self.before = 8, conv(3, 8)
        equal = way in ("half", "another")
        self.a = conv(3, 18 if way == "another" else 16)
        self.b, self.c = conv(8 if equal else 6, 5), conv(8 if equal else 10, 5)

    def forward(self, x):
        if self.way == "slices":
            return self.b((y := F.relu(self.a(x)))[:, : self.one]) + self.c(y[:, self.one :])
        if self.way == "another":
            if (y := self.before(x)).shape[1] != self.channels:
                raise ValueError("not the number of channels that was set")
            first, second, gate = self.a(x).split((y.shape[1], y.shape[1], 2), dim=1)
            return self.b(first * y) + self.c(second * gate[:, :1])
        sizes = {"attributes": lambda: [self.one, self.other], "list": lambda: self.lengths,
                 "half": lambda: self.both // 2, "the rest": lambda: [self.one, self.both - self.one]}  # fmt: skip
        first, second = F.relu(self.a(x)).split(sizes[self.way](), dim=1)
        return self.b(first) + self.c(second)


class Parts(nn.Module):
    """One layer makes a stream and what stays: gates that are counted, or the keys of a single head."""

    def __init__(self, way):
        super().__init__()
        self.way, self.lengths = way, {"gates": (12, 3), "one head": (4, 4, 12), "states": (12, 5)}[way]
        self.a, self.out = conv(3, sum(self.lengths)), conv(12, 5)

    def forward(self, x):
        y, *others = reversed(F.relu(self.a(x)).split(self.lengths, 1)) if self.way == "one head" else (
            self.a(x).split(self.lengths, 1))  # fmt: skip
        if self.way == "gates":
            return self.out(sum(y * others[0][:, i : i + 1] for i in range(3)))
        flat, others = y.flatten(2), [other.flatten(2) for other in others]
        if self.way == "states":
            return self.out((flat @ others[0].transpose(1, 2) @ others[0]).view(len(x), -1, 8, 8))
        weights = (others[0].transpose(1, 2) @ others[1]).softmax(-1)
        return self.out((flat @ weights.transpose(1, 2)).view(len(x), -1, 8, 8))


def networks():
    """Name to network, input shape, scope, and the sites (by producer) that must be found."""
    c = conv
    yield "residual", Graph(lambda n, x: head(n, F.relu(n.a(x)) + n.c(F.relu(n.b(F.relu(n.a(x)))))),
        a=c(3, 12), b=c(12, 10), c=c(10, 12), fc=nn.Linear(12, 4)), IMAGE, "all", {"a", "b"}  # fmt: skip
    yield "residual, hidden", Graph(lambda n, x: head(n, n.a(x) + n.c(F.relu(n.b(x)))),
        a=c(3, 12), b=c(3, 10), c=c(10, 12), fc=nn.Linear(12, 4)), IMAGE, "hidden", {"b"}  # fmt: skip
    yield "depthwise", nn.Sequential(c(3, 12), nn.BatchNorm2d(12), nn.ReLU6(), c(12, 12, groups=12),
        nn.BatchNorm2d(12), nn.SiLU(), c(12, 4, 1)), IMAGE, "hidden", {"0"}  # fmt: skip
    yield "depthwise with a multiplier", nn.Sequential(c(3, 6), nn.ReLU(), c(6, 12, groups=6), nn.ReLU(),
        c(12, 4)), IMAGE, "hidden", {"0"}  # fmt: skip
    yield "squeeze and excitation", Graph(
        lambda n, x: n.out((y := F.relu(n.a(x))) * n.up(F.relu(n.down(y.mean((2, 3), keepdim=True)))).sigmoid()),
        a=c(3, 12), down=c(12, 4, 1), up=c(4, 12, 1), out=c(12, 5)), IMAGE, "hidden", {"a", "down"}  # fmt: skip
    yield "layer scale and group norm", Graph(lambda n, x: n.out(n.gamma.view(-1, 1, 1) * n.norm(n.a(x))),
        a=c(3, 12), norm=nn.GroupNorm(12, 12), gamma=nn.Parameter(torch.randn(12)), out=c(12, 5),
        ), IMAGE, "hidden", {"a"}  # fmt: skip
    yield "a parameter of a stream", Graph(lambda n, x: n.out(n.gamma * n.a(x)),
        a=c(3, 12), gamma=nn.Parameter(torch.randn(1, 12, 8, 8)), out=c(12, 5)), IMAGE, "hidden", {"a"}  # fmt: skip
    yield (
        "grouped",
        nn.Sequential(c(3, 12), nn.ReLU(), c(12, 16, groups=4), nn.ReLU(), c(16, 4)),
        IMAGE,
        "hidden",
        {"0", "2"},
    )
    yield "grouped in part", Graph(
        lambda n, x: n.out(torch.cat([F.relu(n.b((y := F.relu(n.a(x)).chunk(2, 1))[0])), y[1]], 1)),
        a=c(3, 16), b=c(8, 8, groups=4), out=c(16, 4)), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "groups of a stream that goes by heads", Graph(
        lambda n, x: head(n, (y := n.a(x) + n.b(n.a(x))) + F.scaled_dot_product_attention(
            *3 * [y.flatten(2).unflatten(1, (n.heads, -1)).mT], scale=1).mT.reshape(y.shape)),
        a=c(3, 24), b=c(24, 24, groups=4), heads=4, fc=nn.Linear(24, 4)), IMAGE, "all", {"a"}  # fmt: skip
    yield "channel shuffle", Graph(lambda n, x: n.c(shuffle(F.relu(n.b(shuffle(F.relu(n.a(x)), 2))), 2)),
        a=c(3, 12), b=c(12, 16, groups=2), c=c(16, 4)), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "concatenation", Graph(lambda n, x: n.out(torch.cat([F.relu(n.a(x)), x, n.b(x)], 1)),
        a=c(3, 12), b=c(3, 6), out=c(21, 4)), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "chunk", Graph(lambda n, x: n.out((p := n.a(x).chunk(2, 1))[0] * p[1].sigmoid()),
        a=c(3, 12), out=c(6, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
    for way in ("attributes", "list", "half", "the rest", "slices"):
        yield f"split by {way}", Split(way), IMAGE, "hidden", {"a"}
    yield "split by another's length", Split("another"), IMAGE, "all", {"before"}
    for way in ("gates", "one head", "states"):
        yield f"parts that stay, {way}", Parts(way), IMAGE, "hidden", {"a"}
    yield "a scale that is computed and cut", Graph(
        lambda n, x: n.out(n.scales.sigmoid().view(2, -1, 1, 1)[1] * n.a(x)),
        a=c(3, 12), scales=nn.Parameter(torch.randn(2, 12)), out=c(12, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
    yield "repeated", Graph(lambda n, x: n.out(
        (y := n.a(x)).repeat_interleave(2, dim=1) * y.mean((0, 2, 3), keepdim=True).repeat_interleave(len(x), dim=0)
        .repeat_interleave(2, 1)), a=c(3, 12), out=c(24, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
    yield "two consumers", Graph(lambda n, x: n.b(y := F.relu(n.a(x))) + n.c(y),
        a=c(3, 12), b=c(12, 4), c=c(12, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
    yield (
        "flatten with space",
        nn.Sequential(c(3, 12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 4)),
        IMAGE,
        "hidden",
        {"0"},
    )
    yield "transposed", nn.Sequential(nn.ConvTranspose2d(3, 12, 2, 2), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, 2),
        nn.ReLU(), c(8, 4)), IMAGE, "hidden", {"0", "2"}  # fmt: skip
    yield "pixel shuffle", nn.Sequential(c(3, 24), nn.ReLU(), nn.PixelShuffle(2), c(6, 4)), IMAGE, "hidden", {"0"}
    yield "prelu", nn.Sequential(c(3, 12), nn.PReLU(12), c(12, 4)), IMAGE, "hidden", {"0"}
    yield "padding and resampling", Graph(
        lambda n, x: n.out(F.pad(F.interpolate(n.a(x), scale_factor=2), (1, 0, 2, 1))),
        a=c(3, 12), out=c(12, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
    yield (
        "subclass",
        nn.Sequential(AsymmetricConv(3, 12, 2), nn.ReLU(), AsymmetricConv(12, 4, 2)),
        IMAGE,
        "hidden",
        {"0"},
    )
    yield "functional", Functional(), IMAGE, "hidden", {"w1"}
    relu = nn.ReLU()
    yield "one activation in many places", Graph(lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))),
        a=c(3, 12), b=c(12, 10), c=c(10, 4), act=relu), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "a layer called twice", Graph(lambda n, x: n.out(F.relu(n.b(F.relu(n.b(F.relu(n.a(x))))))),
        a=c(3, 12), b=c(12, 12), out=c(12, 4)), IMAGE, "all", {"a"}  # fmt: skip
    yield "tokens", nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)), TOKENS, "hidden", {"0"}
    for fused in (False, True):
        yield f"attention, fused {fused}", Attention(12, 4, 5, fused), TOKENS, "hidden", {"q"}
    yield "multi-head attention", Graph(lambda n, x: n.fc((y := n.a(x)) + n.mha(y, y, y, need_weights=False)[0]),
        a=nn.Linear(12, 16), mha=nn.MultiheadAttention(16, 4, batch_first=True), fc=nn.Linear(16, 3),
        ), TOKENS, "all", {"a"}  # fmt: skip

    for track in (False, True):
        norm = nn.InstanceNorm2d(12, affine=True, track_running_stats=track)
        yield (
            f"instance norm, tracking {track}",
            nn.Sequential(c(3, 12), norm, nn.ReLU(), c(12, 4)),
            IMAGE,
            "hidden",
            {"0"},
        )
    yield "einsum of two streams", Graph(
        lambda n, x: head(n, torch.einsum("bchw,bchw->bchw", n.a(x), n.b(x).sigmoid())), a=c(3, 12), b=c(3, 12),
        fc=nn.Linear(12, 4)), IMAGE, "all", {"a"}  # fmt: skip
    yield "einsum with a gate", Graph(lambda n, x: n.out(torch.einsum("bc,bchw->bchw", n.gate(x.mean((2, 3))), n.a(x))),
        a=c(3, 12), gate=nn.Linear(3, 12), out=c(12, 4)), IMAGE, "all", {"gate"}  # fmt: skip
    yield "attention by einsum", EinsumAttention(12, 4, 5), TOKENS, "hidden", {"q"}


NETWORKS = {name: rest for name, *rest in networks()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_connection_is_cut_right(name):
    """The sites are found; ratio 0 is the identity; what is removed is what a mask would silence."""
    torch.manual_seed(0)
    model, shape, scope, expected = copy.deepcopy(NETWORKS[name])
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.InstanceNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(shape)
    found = trace(model, x, scope)
    assert {site.name for site in found.sites} == expected, found.skipped
    with torch.no_grad():
        assert torch.equal(compress(model, x, ratio=0, scope=scope).model(x), model(x))
        for ratio in (0.4, 0.75):
            result = compress(model, x, "prune", ratio=ratio, scope=scope)
            torch.testing.assert_close(
                result.model(x), masked(model, result, found.sites)(x), rtol=1e-5, atol=1e-5, msg=f"ratio {ratio}"
            )
            assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    assert set(result.model.state_dict()) == set(model.state_dict())
    twin = copy.deepcopy(result.model)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in result.model.parameters()]


@pytest.mark.parametrize("way", ["attributes", "list", "half", "the rest", "slices"])
def test_no_part_of_a_split_loses_all_its_channels(way):
    """Of 16 channels one would be asked to stay: a part of them would be empty, which no layer can read."""
    model, x = NETWORKS[f"split by {way}"][0], torch.randn(IMAGE)
    small = compress(model, x, ratio=0.95).model
    assert small.a.out_channels == 2 and small.b.in_channels == small.c.in_channels == 1
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_that_mixes_channels_is_that_of_the_survivors(affine):
    """Here a mask would leave zeros among what RMSNorm averages over; the narrow network has only what stayed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 16), nn.RMSNorm(16, elementwise_affine=affine), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4)
    )
    if affine:
        nn.init.normal_(model[1].weight)
    x = torch.randn(TOKENS)
    for ratio in (0, 0.25, 0.5):
        result = compress(model, x, "prune", ratio=ratio)
        first, second = result.keep["0"], result.keep["2"]
        assert (len(first), len(second)) == (16 * (1 - ratio), 20 * (1 - ratio))
        assert result.model[1].normalized_shape == (len(first),)
        weight = model[1].weight[first] if affine else None
        with torch.no_grad():
            normalised = F.rms_norm(model[0](x)[..., first], (len(first),), weight)
            hidden = F.linear(normalised, model[2].weight[second][:, first], model[2].bias[second])
            wanted = F.linear(F.relu(hidden), model[4].weight[:, second], model[4].bias)
            torch.testing.assert_close(result.model(x), wanted, rtol=1e-5, atol=1e-5)
            assert ratio or torch.equal(result.model(x), model(x))


class PlainRMSNorm2d(nn.Module):
    """As somebody writes it out."""

    def __init__(self, channels):
        super().__init__()
        self.normalized_shape, self.weight = (channels,), nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.weight.view(-1, 1, 1)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's, channels first."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x):
        size = x.norm(dim=(2, 3), keepdim=True)
        return x + self.gamma * x * size / (size.mean(1, keepdim=True) + 1e-6) + self.beta


@pytest.mark.parametrize("norm", [PlainRMSNorm2d, ResponseNorm])
def test_a_norm_that_is_written_out_is_that_of_the_survivors(norm):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 12), norm(12), nn.ReLU(), conv(12, 4)).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        assert torch.equal(compress(model, x, ratio=0).model(x), model(x))
        result = compress(model, x, "prune", ratio=0.5)
        keep, small = result.keep["0"], copy.deepcopy(model)
        for name, tensor in small[1].named_parameters():
            setattr(small[1], name, nn.Parameter(tensor.index_select(tensor.shape.index(12), keep)))
        wanted = F.conv2d(small[1](model[0](x)[:, keep]).relu(), model[3].weight[:, keep], model[3].bias, padding=1)
        torch.testing.assert_close(result.model(x), wanted)


class GroupedNorm(PlainRMSNorm2d):
    """In two runs of channels; or of every second and the others. Both run at any width."""

    def __init__(self, channels, apart):
        super().__init__(channels)
        self.apart = apart

    def forward(self, x):
        parts = (x[:, ::2], x[:, 1::2]) if self.apart else (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])
        sizes = [(part.square().mean(1, keepdim=True) + 1e-6).rsqrt().expand_as(part) for part in parts]
        size = torch.stack(sizes, 2).flatten(1, 2) if self.apart and x.shape[1] % 2 == 0 else torch.cat(sizes, 1)
        return x * size * self.weight.view(-1, 1, 1)


class HalfNorm(PlainRMSNorm2d):
    """Of the first half."""

    def forward(self, x):
        first, second = x.chunk(2, 1)
        size = first.square().mean(1, keepdim=True)
        return torch.cat([first * (size + 1e-6).rsqrt(), second], 1) * self.weight.view(-1, 1, 1)


@pytest.mark.parametrize("norm", [GroupedNorm(12, False), GroupedNorm(12, True), HalfNorm(12)])
def test_a_norm_that_is_written_out_and_knows_its_channels_by_their_place_stays_whole(norm):
    found = trace(nn.Sequential(conv(3, 12), norm, conv(12, 4)).eval(), torch.randn(IMAGE))
    assert not found.sites
    assert found.skipped["0"] == "1 does not treat all channels alike"
