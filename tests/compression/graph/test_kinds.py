"""Kinds of code that networks of timm and transformers have, as small modules: narrow is what it is masked."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress, trace
from tests.oracles import masked

IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 12)


def agrees(model, x, ratio=0.5):
    """Compress a network; ratio 0 gives the same bits, and narrow it says what it is masked."""
    model = model.eval()
    with torch.no_grad():
        assert torch.equal(compress(model, x, ratio=0, scope="all").model(x), model(x))
        result = compress(model, x, "prune", ratio=ratio, scope="all")
        wide = masked(model, result, trace(model, x, "all").sites)
        torch.testing.assert_close(result.model(x), wide(x), rtol=1e-4, atol=1e-5)
    return result


class BareNorm(nn.Module):
    """RMSNorm without a weight."""

    def __init__(self, channels):
        super().__init__()
        self.normalized_shape = (channels,)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape)


def test_a_norm_without_parameters_is_that_of_the_survivors():
    model, x = nn.Sequential(nn.Linear(12, 16), BareNorm(16), nn.Linear(16, 4)).eval(), torch.randn(TOKENS)
    assert torch.equal(compress(model, x, ratio=0).model(x), model(x))
    result = compress(model, x, "prune", ratio=0.5)
    keep = result.keep["0"]
    assert result.model[1].normalized_shape == (8,)
    normed = F.rms_norm(model[0](x)[..., keep], (8,))
    torch.testing.assert_close(result.model(x), F.linear(normed, model[2].weight[:, keep], model[2].bias))


class Registers(nn.Module):
    """Several tokens of its own before the others."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.tokens = nn.Parameter(torch.randn(1, 3, 16))

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), self.embed(x)], dim=1)
        return self.head(x + self.fc(x).relu())


def test_tokens_of_the_network_s_own_shrink_with_the_others():
    result = agrees(Registers(), torch.randn(TOKENS))
    assert result.model.tokens.shape == (1, 3, 8)
    assert result.model.fc.weight.shape == (8, 8)


class Settings(nn.Module):
    """Its code reads a width in the settings that all modules share."""

    def __init__(self, config):
        super().__init__()
        self.config, self.embed, self.head = config, nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.config.widths[-1])
        return self.head(x.mean(1))


def test_a_width_in_a_module_s_settings_goes_with_its_channels():
    config = SimpleNamespace(widths=[8, 16], depth=2)
    model = Settings(config)
    result = agrees(model, torch.randn(IMAGE))
    assert result.model.config.widths == [8, 8]
    assert model.config is config and config.widths == [8, 16]


class SizedHeads(nn.Module):
    """Attention whose heads' length is called their size."""

    def __init__(self):
        super().__init__()
        self.attention_head_size, self.all_head_size = 4, 16
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).contiguous()
        return self.out(x.view(*x.size()[:-2], self.all_head_size))


def test_the_size_of_heads_is_not_their_number():
    result = agrees(SizedHeads(), torch.randn(2, 5, 16))
    assert result.model.query.out_features == result.model.all_head_size == 8
    assert result.model.attention_head_size == 4


class Resized(nn.Module):
    """Positions that are stretched to the image's size, but for the first."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 4)
        self.first, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))

    def forward(self, x):
        x = self.embed(x)
        size = x.shape[2:]
        table = self.positions[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size, mode="bilinear").flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.head(x + torch.cat([self.positions[:, :1], table], dim=1))


def test_positions_that_are_stretched_shrink_with_their_channels():
    assert agrees(Resized(), torch.randn(IMAGE)).model.positions.shape == (1, 5, 8)


class Blur(nn.Module):
    """A fixed filter for each channel, or one for all, as a function."""

    def __init__(self, own):
        super().__init__()
        self.channels = 16 if own else None
        self.register_buffer("filter", torch.rand(16 if own else 1, 1, 3, 3))

    def forward(self, x):
        channels = x.shape[1] if self.channels is None else self.channels
        weight = self.filter if self.channels else self.filter.expand(channels, 1, 3, 3)
        return F.conv2d(x, weight, stride=2, groups=channels)


@pytest.mark.parametrize("own", [True, False])
def test_a_filter_of_each_channel_may_be_a_function(own):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Blur(own), nn.ReLU(), nn.Conv2d(16, 4, 1))
    result = agrees(model, torch.randn(IMAGE))
    assert result.model[0].out_channels == 8
    assert result.model[2].filter.shape[0] == (8 if own else 1)
    assert result.model[2].channels == (8 if own else None)


class Selective(nn.Module):
    """Two paths, and a gate that chooses between them for each channel; its code expects as many paths as it has."""

    def __init__(self, channels=16, paths=2):
        super().__init__()
        self.paths = paths
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 2 * i + 1, padding=i) for i in range(paths))
        self.squeeze, self.select = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, paths * channels, 1)

    def forward(self, x):
        x = torch.stack([conv(x) for conv in self.convs], dim=1)
        assert x.shape[1] == self.paths
        gate = self.select(self.squeeze(x.sum(1).mean((2, 3), keepdim=True)).relu())
        b, c, h, w = gate.shape
        return (x * gate.view(b, self.paths, c // self.paths, h, w).softmax(dim=1)).sum(dim=1)


def test_a_number_of_paths_is_no_number_of_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Selective(), nn.Flatten(), nn.Linear(16 * 64, 5))
    result = agrees(model, torch.randn(IMAGE))
    assert result.model[1].paths == 2 and result.model[1].select.out_channels == 16
    assert result.model[1].convs[1].out_channels == 8
