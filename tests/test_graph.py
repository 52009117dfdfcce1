"""The graph engine on small networks, a fact for each kind of connection, and on random ones."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo import masked
from nm_lightning import compress, trace
from nm_lightning.compression import cost
from nm_lightning.errors import InputError


class Graph(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Attention(nn.Module):
    """Self-attention with layers of its own for q, k and v, and the number of heads as an attribute."""

    def __init__(self, width, heads, head_dim, fused):
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, head_dim, fused
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


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
HEAD = {"fc": nn.Linear(12, 4)}


def head(net, x):
    return net.fc(x.mean((2, 3)))


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
    yield "channel shuffle", Graph(lambda n, x: n.c(shuffle(F.relu(n.b(shuffle(F.relu(n.a(x)), 2))), 2)),
        a=c(3, 12), b=c(12, 16, groups=2), c=c(16, 4)), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "concatenation", Graph(lambda n, x: n.out(torch.cat([F.relu(n.a(x)), x, n.b(x)], 1)),
        a=c(3, 12), b=c(3, 6), out=c(21, 4)), IMAGE, "hidden", {"a", "b"}  # fmt: skip
    yield "chunk", Graph(lambda n, x: n.out((p := n.a(x).chunk(2, 1))[0] * p[1].sigmoid()),
        a=c(3, 12), out=c(6, 4)), IMAGE, "hidden", {"a"}  # fmt: skip
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


NETWORKS = {name: rest for name, *rest in networks()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_connection_is_cut_right(name):
    """The sites are found; ratio 0 is the identity; what is removed is what a mask would silence."""
    torch.manual_seed(0)
    model, shape, scope, expected = copy.deepcopy(NETWORKS[name])
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
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


def test_numbers_are_true_afterwards():
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), conv(12, 12, groups=12), nn.PReLU(12), conv(12, 4))
    narrow = compress(model, torch.zeros(IMAGE), ratio=0.5).model
    first, norm, depthwise, prelu, last = narrow
    assert (first.out_channels, norm.num_features, prelu.num_parameters, last.in_channels) == (6, 6, 6, 6)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (6, 6, 6)


def test_a_number_in_the_users_code_is_refused_in_one_line():
    model = Graph(lambda n, x: n.fc(n.a(x).view(-1, 12 * 64)), a=conv(3, 12), fc=nn.Linear(12 * 64, 4))
    found = trace(model, torch.zeros(IMAGE))
    assert not found.sites
    assert "768" in found.skipped["a"]
    assert "test_graph.py, line" in found.skipped["a"]


class Standardised(nn.Conv2d):
    """A subclass whose weight is standardised over its columns before use."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


def test_a_subclass_that_standardises_its_weight_keeps_its_columns():
    model = nn.Sequential(conv(3, 12), nn.ReLU(), Standardised(12, 8, 3), nn.ReLU(), conv(8, 4))
    found = trace(model, torch.zeros(IMAGE))
    assert [site.name for site in found.sites] == ["2"]
    assert "not linear in its weight" in found.skipped["0"]


def test_layers_that_are_not_looked_into_are_listed():
    model = nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), nn.Linear(12, 3))
    found = trace(model, torch.zeros(TOKENS))
    assert "not looked into" in found.skipped["1"]
    assert "transformerencoderlayer" in found.skipped["0"]


def test_what_cannot_be_traced_names_the_users_line():
    model = Graph(lambda n, x: n.a(x) if x.sum() > 0 else n.b(x), a=conv(3, 12), b=conv(3, 12))
    with pytest.raises(InputError, match=r"can't be traced.*test_graph\.py, line \d+: model = Graph"):
        trace(model, torch.zeros(IMAGE))
    with pytest.raises(InputError, match=r"rejects an input of shape \(2, 7\)|rejects an input of shape \(1, 7\)"):
        trace(nn.Sequential(conv(3, 4)), torch.zeros(2, 7))


def test_hooks_modes_types_and_gradients_are_kept():
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 4)).to(torch.bfloat16)
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(1))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    narrow = compress(model, torch.zeros(IMAGE), ratio=0.5).model
    assert narrow(torch.zeros(IMAGE, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert calls
    assert [module.training for module in narrow] == [True, False, True, True]
    assert not narrow[0].weight.requires_grad
    assert narrow[3].weight.requires_grad
    double = compress(model.double(), torch.zeros(IMAGE), ratio=0.5).model
    assert double[3].weight.dtype == torch.float64
    trained = copy.deepcopy(double).train()
    trained(torch.randn(IMAGE).double()).sum().backward()
    assert trained[3].weight.grad.shape == (4, 6, 3, 3)


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_the_result_shares_no_memory_with_the_input(ratio):
    model = nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 4))
    before = copy.deepcopy(model.state_dict())
    narrow = compress(model, torch.zeros(IMAGE), "merge", ratio=ratio, threshold=0).model
    with torch.no_grad():
        for tensor in narrow.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(),
                          nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3))  # fmt: skip
    model[4].weight = model[2].weight
    x = torch.randn(4, 6)
    narrow = compress(model, x, ratio=0.5, scope="all").model
    assert narrow[4].weight is narrow[2].weight
    assert narrow[2].weight.shape == (6, 6)
    assert narrow(x).shape == (4, 3)


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm", "mask", "spectral_norm"])
def test_parametrised_weights_are_made_plain(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(model[0])
    elif kind == "old_weight_norm":
        nn.utils.weight_norm(model[0])
    elif kind == "mask":
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.3)
    else:
        nn.utils.parametrizations.spectral_norm(model[0])
    model.eval()
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = model(x)
        same = compress(model, x, ratio=0)
        torch.testing.assert_close(same.model(x), expected)
        assert "made plain" in same.report.notes[0]
        assert compress(model, x, ratio=0.5).model[0].weight.shape == (6, 6)
        torch.testing.assert_close(model(x), expected)


def test_wrappers_are_taken_off():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    narrow = compress(nn.DataParallel(torch.compile(model)), torch.zeros(1, 6), ratio=0.5).model
    assert type(narrow) is nn.Sequential
    assert pickle.loads(pickle.dumps(narrow))[0].out_features == 6


def test_auxiliary_heads_are_sliced_too():
    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.fc = conv(3, 12), conv(12, 5), conv(12, 4)

        def forward(self, x):
            x = F.relu(self.a(x))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    narrow = compress(WithAuxiliary().eval(), torch.zeros(IMAGE), ratio=0.5).model
    outputs = narrow.train()(torch.zeros(IMAGE))
    assert [output.shape[1] for output in outputs] == [4, 5]


def test_merging_a_grouped_convolution_stays_within_its_groups():
    """Duplicates inside one group merge without loss; the copies of another group can't help."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 12, bias=False), nn.ReLU(), conv(12, 8, groups=2))
    model[0].weight.data[3:6] = 0.5 * model[0].weight.data[0:3]
    model[0].weight.data[9:12] = 0.5 * model[0].weight.data[6:9]
    x = torch.randn(IMAGE)
    with torch.no_grad():
        result = compress(model, x, "merge", "l2-norm", ratio=0.5, threshold=0.9)
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert result.report.sites[0].merged == 6


def test_outputs_may_be_tuples_and_dicts():
    for wrap in (lambda y: (y, y), lambda y: {"logits": y}):
        model = Graph(lambda n, x, wrap=wrap: wrap(n.b(F.relu(n.a(x)))), a=conv(3, 12), b=conv(12, 4))
        assert compress(model, torch.zeros(IMAGE), ratio=0.5).model.a.out_channels == 6


def test_a_network_without_a_site_says_why():
    result = compress(nn.Sequential(nn.Linear(6, 3)), torch.zeros(1, 6))
    assert not result.report.sites
    assert result.report.skipped == {"0": "its neurons are the network's outputs"}


def test_no_layer_loses_all_its_neurons():
    """A gate over a concatenation makes one site of several layers; each keeps at least one neuron."""
    model = Graph(lambda n, x: n.out((y := torch.cat([n.a(x), n.b(x)], 1)) * n.gate(y).sigmoid()),
                  a=conv(3, 12), b=conv(3, 2), gate=conv(14, 14), out=conv(14, 4))  # fmt: skip
    model.b.weight.data.zero_()
    model.b.bias.data.zero_()
    narrow = compress(model, torch.zeros(IMAGE), "prune", ratio=0.9, scope="all").model
    assert narrow.b.out_channels == 1
    assert narrow(torch.zeros(IMAGE)).shape == (2, 4, 8, 8)


def test_widths_of_groups_are_multiples():
    model = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4))
    with pytest.raises(InputError, match="multiple of 4"):
        compress(model, torch.zeros(IMAGE), widths={"0": 6})
    assert compress(model, torch.zeros(IMAGE), ratio=0.99).model[0].out_channels == 4


@pytest.mark.parametrize("method", ["merge", "reconstruct"])
def test_the_result_trains_like_any_network(method, tmp_path):
    """Compiled, wrapped in DDP, pickled: the same outputs; its parameters get gradients and an optimiser's step."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(8, 3, 32, 32)
    narrow = compress(model, x[:1], method, ratio=0.5, scope="all", calibration=x).model
    expected = narrow(x)
    torch.testing.assert_close(torch.compile(narrow, backend="aot_eager")(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(narrow))(x), expected)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(narrow).train())
        optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        F.cross_entropy(wrapped(x), torch.arange(8)).backward()
        assert all(parameter.grad is not None for parameter in wrapped.parameters())
        optimiser.step()
        again = compress(wrapped.eval(), x[:1], method, ratio=0.5, scope="all", calibration=x)
        assert again.model(x).shape == (8, 10)
    finally:
        torch.distributed.destroy_process_group()


def test_the_cost_of_a_network_that_hands_a_parameter_to_a_layer():
    """Such as a class token; torch's counter expects everything that asks for a gradient to have one."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.zeros(1, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x) + self.fc(self.token)

    net = Token()
    assert cost(net, torch.zeros(3, 4)).macs == 16
    assert net.token.requires_grad and net.fc.weight.requires_grad


def test_the_cost_of_tied_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert cost(net, torch.zeros(1, 4)).macs == 32 and cost(net, torch.zeros(1, 4)).parameters == 16 + 8
