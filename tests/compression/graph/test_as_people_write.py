"""Networks as people write them: they shrink to the widths that are named, and the narrow one is the masked one."""

import pytest
import torch
from torch import nn

from nm_lightning import compress, trace
from tests.networks import Graph
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
