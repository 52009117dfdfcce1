"""BatchNorms that see on made images what they saw on the training data."""

import pytest
import torch
from torch import nn

from nm_lightning import compress
from nm_lightning.compression.methods import reconstruct as reconstructing
from nm_lightning.compression.statistics.adapted import adapted, given_back
from nm_lightning.compression.statistics.calibration import Calibration
from nm_lightning.compression.structure.copies import with_data

SHAPE = (3, 10, 10)
EXAMPLE = torch.zeros(1, *SHAPE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own for what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def network(seed: int = 0) -> nn.Module:
    """Two blocks, the second half of the first's filters half of the first half; norms used to normal images."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 6, 5))
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.momentum = None  # the mean over all batches
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for tensor in (model[0].weight, model[1].weight, model[1].bias):
            tensor[4:] = tensor[:4]
        model[0].weight[4:] /= 2
        for _ in range(30):
            model(torch.randn(32, *SHAPE))
    return model.eval()


def test_norms_give_what_their_weights_say_on_all_images_together():
    model, images = network(), 0.3 + 2 * torch.rand(24, *SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = adapted(model, images.split(10))
    for last in (2, 5):
        norm, values = own[last - 1], own[:last](images)
        variance, mean = torch.var_mean(values, [0, 2, 3], correction=0)
        assert torch.allclose(mean, norm.bias, atol=1e-4)
        scale = norm.weight.square() * norm.running_var / (norm.running_var + norm.eps)
        assert torch.allclose(variance, scale, rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_was_put_into_a_mean_is_all_that_stays_of_the_images():
    model, plan = network(), {"slices": {f"1.running_{part}": [(0, 1, [0, 2, 5])] for part in ("mean", "var")}}
    own = adapted(model, [torch.rand(16, *SHAPE)])
    narrow = with_data(own)
    for part, tensor in (("mean", narrow[1].running_mean), ("var", narrow[1].running_var)):
        setattr(narrow[1], f"running_{part}", tensor[[0, 2, 5]].clone())
    narrow[4].running_mean += 0.5
    narrow[4].running_var[2] *= 3
    values = given_back(narrow, plan, model, own)
    assert torch.equal(values["1.running_mean"], model[1].running_mean[[0, 2, 5]])
    assert torch.equal(values["1.running_var"], model[1].running_var[[0, 2, 5]])
    assert torch.allclose(values["4.running_mean"], model[4].running_mean + 0.5, atol=1e-6)
    assert torch.equal(values["4.running_var"][:2], model[4].running_var[:2])
    assert torch.allclose(values["4.running_var"][2], 3 * model[4].running_var[2])


def test_duplicated_neurons_are_removed_without_loss_whatever_the_images():
    model, unseen = network(), torch.randn(16, *SHAPE)
    settings = {"ratio": 0.5, "sites": ["0"], "calibration_size": 32, "ridge": 1e-9}
    result = compress(model, EXAMPLE, "reconstruct", **settings, calibration="synthetic")
    assert result.model[0].out_channels == 4
    assert torch.allclose(result.model(unseen), model(unseen), atol=1e-3)


def test_the_ridge_on_drawn_images_is_ten_times_as_large_and_never_larger(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 12), nn.ReLU(), nn.Linear(12, 5))
    images = torch.cat(Calibration("synthetic", EXAMPLE, 40, model=model, steps=10).batches)
    settings = {"ratio": 0.5, "calibration_size": 40}
    result = compress(model, EXAMPLE, "reconstruct", **settings, calibration="synthetic")
    usual = reconstructing.reconstruct  # forty real images would get another ridge
    monkeypatch.setattr(
        reconstructing, "reconstruct", lambda *given, **named: usual(*given, **named | {"validate": False})
    )
    real = compress(model, EXAMPLE, "reconstruct", **settings, calibration=images, ridge=1e-2)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, real.model.state_dict()[name])
