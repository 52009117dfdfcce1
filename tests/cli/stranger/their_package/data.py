import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader


class Blobs(LightningDataModule):
    """Ten patterns in noise; batches are dictionaries."""

    def __init__(self, batch_size=32, noise: float = 2.0):
        super().__init__()
        self.save_hyperparameters()

    def _loader(self, seed, count, shuffle=False):
        patterns = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (count,), generator=random)
        images = patterns[labels] + self.hparams.noise * torch.randn(count, 1, 8, 8, generator=random)
        rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        return DataLoader(rows, self.hparams.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(1, 1000, shuffle=True)

    def val_dataloader(self):
        return self._loader(2, 500)


class Counted(Blobs):
    num_classes = 10


class Broken(Blobs):
    def setup(self, stage):
        raise FileNotFoundError("no images in /nowhere")
