import torch
from pytorch_lightning import LightningModule
from torch import nn


class Plain(nn.Module):
    def __init__(self, width, act=None):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), act or nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.body(x)


def build(width: int = 48):
    return Plain(width)


class Net(LightningModule):
    def __init__(self, width, rate: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = Plain(width)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch, index):
        self.log("hits", (self(batch["image"]).argmax(1) == batch["label"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.rate, 0.9)


class Active(Net):
    """One whose checkpoints hold an object."""

    def __init__(self, width, act):
        super().__init__(width)
        self.save_hyperparameters()
        self.net = Plain(width, act)


class Fed(Net):
    """One with loaders of its own."""

    def train_dataloader(self):
        from their_package.data import Blobs

        return Blobs().train_dataloader()
