"""Tracing by running: the path that is traced is the one that is called, for other batches too."""

import collections
import dataclasses
import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from nm_lightning import InputError, compress, load, save, trace
from nm_lightning.compression.graph import graph_of
from nm_lightning.compression.structure.copies import with_data
from nm_lightning.compression.structure.inputs import call
from tests.networks import Graph, conv
from tests.oracles import masked

IMAGE, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)


def head(net, x):
    return net.fc(F.relu(net.b(x)).mean((2, 3)))


def network(forward, **layers):
    return Graph(forward, **({"a": conv(3, 12), "b": conv(12, 8), "fc": nn.Linear(8, 4)} | layers))


class Pair(nn.Module):
    """An image, a table that may be missing, and settings."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.b = conv(3, 12), nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, image, table=None, scale=1.0, named=False):
        y = F.relu(self.a(image)).mean((2, 3))
        if table is not None:
            y = y * self.c(table)
        return {"logits": self.b(y) * scale} if named else self.b(y) * scale


class Encoded(nn.Module):
    """Tokens times something for each position, which some function takes from `made`."""

    def __init__(self, positions, **made):
        super().__init__()
        self.a, self.b, self.positions = nn.Linear(12, 16), nn.Linear(16, 3), positions
        for name, tensor in made.items():
            setattr(self, name, tensor)

    def forward(self, x):
        return self.b(F.relu(self.a(x) * self.positions(self, x)))


@dataclasses.dataclass
class Output:
    """What a network may return."""

    logits: torch.Tensor
    hidden: list


class Features(nn.Module):
    """Its forward is another than its class'."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 12), conv(12, 8), nn.Linear(8, 4)
        self.forward = self.features

    def features(self, x):
        return self.b(F.relu(self.a(x)))

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def resized(n, x):
    y = F.relu(n.a(F.max_pool2d(x, 2)))
    if y.shape[-1] != x.shape[-1]:
        y = F.interpolate(y, size=x.shape[-2:])
    return head(n, y)


def asserted(n, x):
    assert x.shape[1] == 3, "RGB"
    assert x.ndim == 4
    return head(n, F.relu(n.a(x)))


def looped(n, x):
    return head(n, torch.cat([F.relu(n.a(x[i : i + 1])) for i in range(len(x))]))


def unpacked(n, x):
    batch, channels, *_ = x.shape
    first, second = F.relu(n.a(x)).view(batch, -1, channels + 5, 8).chunk(2, dim=2)
    return head(n, torch.cat([first, second], dim=2))


def by_keyword(n, x):
    y = torch.cat(tensors=[n.a(input=x)], dim=1)
    y = F.relu(input=y).flatten(start_dim=2).unflatten(2, sizes=(8, 8))
    return n.fc(input=F.relu(n.b(input=y)).mean(dim=(2, 3)))


def buffers(width):
    made = {name: torch.rand(width) + 0.5 for name in ("scale", "shift", "mean", "var")}
    return {name: nn.Buffer(tensor) for name, tensor in made.items()}


NORM = FrozenBatchNorm2d(12)
for _each in NORM.buffers():
    _each.uniform_(0.5, 1.5)

FOLLOWED = {
    "an assertion on the shape": (network(asserted), IMAGE, {"a", "b"}),
    "a branch by sizes": (network(resized), IMAGE, {"a", "b"}),
    "a loop over a length": (network(looped), IMAGE, {"a", "b"}),
    "rows of a batch": (network(lambda n, x: head(n, torch.stack([F.relu(n.a(r)) for r in x]))), IMAGE, {"a", "b"}),
    "unpacked sizes": (network(unpacked), IMAGE, {"a", "b"}),
    "arguments by keyword": (network(by_keyword), IMAGE, {"a", "b"}),
    "a forward of the instance": (Features(), IMAGE, {"a"}),
    "constants first": (network(lambda n, x: head(n, 1 - 2 / (3 + n.a(x).exp()))), IMAGE, {"a", "b"}),
    "defaults": (Pair(), IMAGE, {"a"}),
    "two inputs": (Pair(), (IMAGE, torch.randn(2, 5)), {"a"}),
    "inputs and settings": (Pair(), (IMAGE, torch.randn(2, 5), 2.0, True), {"a"}),
    "inputs by name": (Pair(), {"table": torch.randn(2, 5), "image": IMAGE, "named": True}, {"a"}),
    "a plain tensor attribute": (Encoded(lambda n, x: n.p, p=torch.randn(5, 16)), TOKENS, {"a"}),
    "a buffer cut to length": (
        Encoded(lambda n, x: n.p[: x.size(1)], p=nn.Buffer(torch.randn(9, 16))), TOKENS, {"a"}),
    "a parameter cut and transposed": (
        Encoded(lambda n, x: n.p[:, :, : x.shape[1]].mT, p=nn.Parameter(torch.randn(1, 16, 9))), TOKENS, {"a"}),
    "a squeezed buffer": (Encoded(lambda n, x: n.p.squeeze(-1), p=nn.Buffer(torch.rand(1, 16, 1))), TOKENS, {"a"}),
    "a frozen norm": (nn.Sequential(conv(3, 12), NORM, nn.ReLU(), conv(12, 4)), IMAGE, {"0"}),
    "torch.batch_norm": (
        Graph(lambda n, x: n.b(torch.batch_norm(n.a(x), n.scale, n.shift, n.mean, n.var, False, 0.1, 1e-5, False)),
              a=conv(3, 12), b=conv(12, 4), **buffers(12)), IMAGE, {"a"}),
    "a gate by slices": (
        Graph(lambda n, x: n.b((y := n.a(x))[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].sigmoid()),
              a=conv(3, 12), b=conv(6, 4)), IMAGE, {"a"}),
    "frames in the batch": (
        Graph(lambda n, x: n.b(F.relu(n.a(x)).unflatten(0, (-1, 4)).mean(1)), a=nn.Linear(6, 16), b=nn.Linear(16, 3)),
        torch.randn(8, 6), {"a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_shapes_and_settings_decide_is_followed(name, tmp_path):
    """The sites are found; what is removed is what a mask would silence; it loads again."""
    torch.manual_seed(0)
    model, inputs, sites = FOLLOWED[name]
    model.eval()
    found = trace(model, inputs, "all")
    assert {site.name for site in found.sites} == sites, found.skipped
    result = compress(model, inputs, "prune", ratio=0.5, scope="all")
    save(result, tmp_path / "small.pt")
    wide = with_data(model)
    with torch.no_grad():
        wanted = call(masked(model, result, found.sites), inputs)
        for narrow in (result.model, load(tmp_path / "small.pt", into=wide)):
            torch.testing.assert_close(call(narrow, inputs), wanted, rtol=1e-5, atol=1e-5)


GENERIC = ("a branch by sizes", "unpacked sizes", "two inputs", "inputs by name", "a buffer cut to length")


@pytest.mark.parametrize("name", GENERIC)
def test_a_graph_runs_on_other_batches(name):
    model, inputs, _ = FOLLOWED[name]
    graph = graph_of(model.eval(), inputs)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    assert len([node for node in graph.nodes if node.op == "placeholder"]) == len(tensors)
    longer = torch.utils._pytree.tree_map_only(torch.Tensor, lambda each: torch.cat([each, each, each]), inputs)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(longer) if isinstance(leaf, torch.Tensor)]
    wanted = call(model, longer)
    wanted = wanted["logits"] if isinstance(wanted, dict) else wanted
    found = fx.Interpreter(model, graph=graph).run(*tensors)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, wanted)


def test_a_length_stays_a_length():
    model = Graph(lambda n, x: n.b(n.a(x).mean((2, 3)).view(len(x), -1)), a=conv(3, 12), b=nn.Linear(12, 4))
    graph = graph_of(model, IMAGE)
    assert fx.Interpreter(model, graph=graph).run(torch.zeros(7, 3, 8, 8)).shape == (7, 4)
    assert len([1, 2]) == 2
    assert type(len(IMAGE)) is int, "builtins are as they were"


KINDS = {
    "dataclass": lambda y, z: Output(y, [z]),
    "named tuple": lambda y, z: collections.namedtuple("Both", "first second")(y, z),
    "ordered": lambda y, z: collections.OrderedDict(a=y, b={"c": (z,)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_any_kind_keep_their_kind_and_their_width(kind):
    make = KINDS[kind]

    def forward(n, x):
        hidden = F.relu(n.b(F.relu(n.a(x)))).mean((2, 3))
        return make(n.fc(hidden), hidden)

    model = network(forward)
    result = compress(model, IMAGE, ratio=0.5)
    assert result.report.widths == {"a": 6}, "b's neurons are an output"
    assert result.report.skipped["b"] == "its neurons are the network's outputs"
    assert type(result.model(IMAGE)).__name__ == type(model(IMAGE)).__name__


def decided(n, x):
    y = n.a(x)
    return head(n, y if y.sum() > 0 else -y)


@pytest.mark.parametrize("ask", [decided, lambda n, x: head(n, n.a(x) * int(x.amax()))])
def test_values_decide_nothing(ask):
    with pytest.raises(InputError, match=r"^Graph decides by an activation's values \(test_tracer\.py, line \d+\)$"):
        trace(network(ask), IMAGE)


def test_a_parameters_value_may_decide():
    model = network(lambda n, x: head(n, n.a(x) if n.flag else n.b(x)), flag=nn.Buffer(torch.tensor(True)))
    assert {site.name for site in trace(model, IMAGE).sites} == {"a", "b"}


def test_an_error_is_whose_it_is():
    with pytest.raises(InputError, match=r"^Graph rejects an input of shape \(2, 3, 8, 8\): .*test_tracer\.py, line"):
        trace(network(lambda n, x: n.b(x)), IMAGE)
    with pytest.raises(InputError, match=r"^Pair rejects an input of shape \(2, 3, 8, 8\) and \(2, 4\): "):
        trace(Pair(), (IMAGE, torch.zeros(2, 4)))
    skipped = trace(nn.Sequential(nn.Linear(12, 8), nn.LogSoftmax(1), nn.Linear(8, 2)), torch.randn(1, 12)).skipped
    assert skipped["0"] == "mixed by logsoftmax"


def test_a_width_that_the_code_asserts_stays_alone():
    """The narrow network's own assertion fails: the site that it speaks of stays, and no other."""

    def forward(n, x):
        y = F.relu(n.a(x))
        assert y.shape[1] == 12
        return head(n, y)

    found = trace(network(forward), IMAGE)
    assert [site.name for site in found.sites] == ["b"]
    assert found.skipped["a"].startswith("a narrower network fails: ")


def test_a_forward_that_holds_on_to_the_original_is_cut_in_a_copy():
    model = network(head)
    model.forward = lambda x: head(model, F.relu(model.a(x)))
    wanted = model(IMAGE)
    assert compress(model, IMAGE).model(IMAGE).shape == wanted.shape
    assert torch.equal(model(IMAGE), wanted) and compress(model, IMAGE).model.a.out_channels == 6


APART = {
    "rolled": lambda y: torch.roll(y, 1, 1),
    "first and rest": lambda y: torch.cat([y[:, :1].square(), y[:, 1:]], 1),
    "unequal by number": lambda y: torch.cat([y.narrow(1, 0, 4) * 2, y.narrow(1, 4, 8)], 1),
    "halves from the shape": lambda y: torch.cat([y[:, : y.shape[1] // 2].square(), y[:, y.shape[1] // 2 :]], 1),
    "halves by a fraction": lambda y: torch.cat([y[:, : int(y.size(1) * 0.5)].exp(), y[:, int(y.size(1) * 0.5) :]], 1),
    "every other": lambda y: torch.stack([y[:, ::2].square(), y[:, 1::2]], 2).flatten(1, 2),
    "cropped and padded": lambda y: F.pad(F.pad(y, (0, 0, 0, 0, -2, 0)), (0, 0, 0, 0, 0, 2)),
    "over the root of the width": lambda y: y / y.shape[1] ** 0.5,
    "over the root of the width, by math": lambda y: y / math.sqrt(y.shape[1]),
    "by place": lambda y: y * torch.arange(y.shape[1], device=y.device).view(-1, 1, 1),
    "split by keyword": lambda y: torch.cat([part.abs() for part in y.split(split_size=4, dim=1)], 1),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_done_by_place_or_number_of_channels_stays(name):
    found = trace(network(lambda n, x: head(n, APART[name](F.relu(n.a(x))))), IMAGE)
    assert [site.name for site in found.sites] == ["b"]
    assert "test_tracer.py, line" in found.skipped["a"]


def test_fixed_positions_that_are_added_stay_with_their_neurons():
    """They say something where a layer says nothing: a neuron that looks dead is not."""

    def forward(n, x):
        return n.b(F.relu(n.f(n.a(x) + n.p[: x.size(1)])))

    tables = {"buffer": nn.Buffer(torch.randn(9, 16)), "attribute": torch.randn(9, 16)}
    for table in tables.values():
        model = Graph(forward, a=nn.Linear(12, 16), f=nn.Linear(16, 8), b=nn.Linear(8, 3), p=table)
        found = trace(model, TOKENS)
        assert [site.name for site in found.sites] == ["f"]
        assert found.skipped["a"] == "added to other neurons, which can't shrink"


def test_an_assignment_into_an_activation_stays():
    def forward(n, x):
        y = F.relu(n.a(x))
        y[:, 0] = 0
        return head(n, y)

    model = network(forward)
    found = trace(model, IMAGE)
    assert [site.name for site in found.sites] == ["b"]
    assert found.skipped["a"].startswith("it is written into (test_tracer.py, line")
    with torch.no_grad():
        same = compress(model, IMAGE, "reconstruct", ratio=0, calibration=torch.randn(8, 3, 8, 8)).model
        torch.testing.assert_close(same(IMAGE), model(IMAGE))


class Grouped(nn.Module):
    """Grouped-query attention: 8 heads of queries, 2 of keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_queries_that_share_keys_go_with_them():
    torch.manual_seed(0)
    model = Grouped().eval()
    found = trace(model, TOKENS, "all")
    result = compress(model, TOKENS, "prune", ratio=0.5, scope="all")
    assert (result.model.q.out_features, result.model.k.out_features, result.model.v.out_features) == (16, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(result.model(TOKENS), masked(model, result, found.sites)(TOKENS))


def test_what_a_module_keeps_of_one_run_is_not_met_in_the_next():
    """A table that is computed once, and kept in a dictionary: the narrow network computes its own."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.cache = nn.Linear(6, 12), nn.Linear(12, 3), {}
            self.table = nn.Parameter(torch.randn(1, 12))

        def forward(self, x):
            if "table" not in self.cache:
                self.cache["table"] = self.table * 2
            return self.b(F.relu(self.a(x) + self.cache["table"]))

    model, x = Keeps(), torch.randn(2, 6)
    result = compress(model, x, ratio=0.5)
    assert result.model.a.out_features == 6 and not model.cache
    assert result.model(x).shape == model(x).shape
