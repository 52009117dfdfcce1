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
