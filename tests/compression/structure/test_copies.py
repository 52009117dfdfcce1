"""Copies: parametrised weights made plain, wrappers taken off."""

import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nm_lightning import InputError, compress, load, save, trace


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


def small():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))


class Outer(nn.Module):
    """A network whose part is wrapped."""

    def __init__(self, wrap):
        super().__init__()
        self.backbone, self.head = wrap(small()[:4]), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


WRAPS = {
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "compiled in place": compiled_in_place,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
}


@pytest.mark.parametrize("kind", WRAPS)
def test_wrappers_inside_are_taken_off_too(kind, tmp_path):
    x, model = torch.randn(4, 6), Outer(WRAPS[kind])
    result = compress(model, x, "prune", ratio=0.5)
    within = "backbone.module" if kind == "averaged" else "backbone"  # a moving average stays one: it has work to do
    assert result.report.widths == {f"{within}.0": 6, f"{within}.2": 6}
    assert type(result.model.get_submodule(within)) is nn.Sequential
    assert result.model(x).shape == (4, 3), "no wide code runs"
    save(result, tmp_path / "small.pt")
    torch.testing.assert_close(load(tmp_path / "small.pt", into=Outer(WRAPS[kind]))(x), result.model(x))
    assert compress(WRAPS[kind](small()), x, ratio=0.5).report.widths == {"0": 6, "2": 6}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.jit.script(small()), "is a TorchScript module"),
        (lambda: nn.Sequential(nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(3)), r"^0 \(LazyLinear\) is a lazy layer"),
        (lambda: torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, torch.qint8), r"\(Linear\) is quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_parts_without_plain_weights_are_refused_in_one_line(make, says):
    for find in (compress, trace):
        with pytest.raises(InputError, match=says):
            find(make(), torch.randn(2, 6))


def test_an_activation_that_a_network_keeps_is_no_obstacle():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            self.activation = self.a(x).relu()
            return self.b(self.activation)

    model, x = Watched(), torch.randn(4, 6)
    model(x)
    assert compress(model, x, "merge", ratio=0.5).model(x).shape == (4, 3)


def test_a_spectral_norm_in_training_is_made_plain_as_it_is_evaluated():
    """Whenever it is asked in training, it takes a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 12)), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(4, 6)
    same = compress(model, x, ratio=0).model.eval()
    assert torch.equal(same(x), model.eval()(x))


def test_an_old_spectral_norm_loads_again(tmp_path):
    def make():
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 12)), nn.ReLU(), nn.Linear(12, 3)).eval()

    x = torch.randn(4, 6)
    result = compress(make(), x, "prune", ratio=0.5)
    save(result, tmp_path / "small.pt")
    torch.testing.assert_close(load(tmp_path / "small.pt", into=make())(x), result.model(x))


class Settings(dict):
    """A dictionary whose entries are attributes: it can't be copied."""

    __getattr__ = dict.__getitem__


def test_what_cannot_be_copied_is_shared():
    model = small()
    model.settings = Settings(width=12)
    result = compress(model, torch.randn(4, 6), "prune", ratio=0.5)
    assert result.model[0].out_features == 6 and result.model.settings is model.settings
