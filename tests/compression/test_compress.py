"""One call from a trained network to a smaller one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress, load, save, trace
from tests.networks import (
    ARCHITECTURES,
    random_network,
)


@pytest.mark.parametrize(("name", "shape"), ARCHITECTURES)
def test_ratio_zero_is_the_identity_and_the_input_is_left_alone(name, shape):
    model = random_network(name, 7, shape)
    images = torch.randn(2, *shape)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(compress(model, images, ratio=0).model(images), expected)
        narrow = compress(model, images, ratio=0.5).model
        assert narrow(images).shape == expected.shape
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())


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


def small():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


def spoilt(value):
    model = small()
    model[0].weight.data[0, 0] = value
    return model


X = torch.zeros(4, 6)
BAD = {
    "0.weight holds values that are not finite": lambda: compress(spoilt(torch.nan), X, "prune"),
    "0.weight holds values that are not finite: has": lambda: compress(spoilt(torch.inf), X, "fold"),
    "0.weight has no data": lambda: compress(small().to("meta"), X),
    "0.weight is float8_e4m3fn": lambda: compress(small().to(torch.float8_e4m3fn), X),
    "model is the class Linear": lambda: compress(nn.Linear, X),
    "model is a str": lambda: compress("best.ckpt", X),
    "model is a NoneType": lambda: trace(None, X),
    "holds no images: its shape is \\(0, 6\\)": lambda: compress(small(), X[:0]),
    "recipe is a dict": lambda: compress(small(), X, recipe={"method": "prune"}),
    "refinement 'refit' is a str": lambda: compress(small(), X, then=["refit"]),
    "budget 0.5 is a float": lambda: compress(small(), X, budget=0.5),
    "sites 0": lambda: compress(small(), X, sites=[0]),
    "seed 'one'": lambda: compress(small(), X, seed="one"),
    "save was given a Sequential": lambda: save(small(), "small.pt"),
    "into is a str": lambda: load("small.pt", into="resnet20"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_clear_line(line):
    with pytest.raises(InputError, match=line) as caught:
        BAD[line]()
    assert "\n" not in str(caught.value)
