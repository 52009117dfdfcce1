"""Fine-tuning without labels."""

import pytest
import torch
from torch.nn import functional as F

from nm_lightning import InputError, compress
from tests.networks import Residual, images, lively


@pytest.mark.parametrize(("method", "share"), [("prune", 0.8), ("reconstruct", 0.97)])
def test_finetuning_learns_the_originals_predictions(method, share):
    model, x = lively(Residual()), images(256)
    model.stem.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"method": method, "ratio": 0.5, "calibration": x}
    rough, fine, again = (compress(model, x[:1], finetune=epochs, **settings).model for epochs in (0, 20, 20))

    def divergence(network):
        with torch.no_grad():
            pair = (network(x).log_softmax(1), model(x).log_softmax(1))
        return float(F.kl_div(*pair, reduction="batchmean", log_target=True))

    assert divergence(fine) < share * divergence(rough)
    assert torch.equal(fine(x), again(x))
    assert torch.equal(fine.stem.weight, rough.stem.weight)
    assert torch.equal(fine.blocks[0][1].running_mean, rough.blocks[0][1].running_mean)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not fine.training
    with pytest.raises(InputError, match="finetune -1"):
        compress(model, x[:1], finetune=-1, **settings)


class Drawn:
    """Other images at each pass, as augmentation gives them, with labels that nobody may read."""

    def __init__(self, size=256):
        self.size, self.passes = size, []

    def __len__(self):
        return self.size // 64

    def __iter__(self):
        images_ = images(self.size) + 0.1 * torch.randn(self.size, 1, 1, 1)
        self.passes.append(images_)
        for batch in images_.split(64):
            yield batch, None


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_all_training_images_anew_each_epoch(method):
    """No calibration images are needed, norms learn, and what is drawn follows the seed."""
    model, x = lively(Residual()), images(256)
    settings = {"method": method, "ratio": 0.5, "finetune_on": "training"}
    loader = Drawn()
    rough = compress(model, x[:1], method, ratio=0.5).model
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fine, again = (compress(model, x[:1], finetune=20, training=loader, **settings).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader.passes) == 40
    assert not torch.equal(loader.passes[0], loader.passes[1])
    assert torch.equal(loader.passes[0], loader.passes[20])
    assert torch.equal(fine(x), again(x))
    assert not torch.equal(fine.blocks[0][1].running_mean, rough.blocks[0][1].running_mean)

    def divergence(network):
        with torch.no_grad():
            pair = (network(x).log_softmax(1), model(x).log_softmax(1))
        return float(F.kl_div(*pair, reduction="batchmean", log_target=True))

    assert divergence(fine) < 0.8 * divergence(rough)
    with pytest.raises(InputError, match="finetune_on training: give training, a DataLoader"):
        compress(model, x[:1], finetune=1, **settings)
    with pytest.raises(InputError, match="the loader has no length"):
        compress(model, x[:1], finetune=1, training=iter([]), **settings)
    with pytest.raises(InputError, match="unknown finetune_on 'all': choose from calibration, training"):
        compress(model, x[:1], finetune=1, finetune_on="all")


def test_a_forward_that_keeps_an_activation():
    """A kept activation has as many rows as the last batch: it is nothing that was learned."""

    class Keeps(Residual):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    model, x = lively(Keeps()), images(40)
    model(x[:3])
    narrow = compress(model, x[:1], ratio=0.5, calibration=x, finetune=1).model
    assert narrow(x).shape == model(x).shape
