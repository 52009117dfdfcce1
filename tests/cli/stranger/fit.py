"""A stranger's training, which knows nothing of this project: `python fit.py`."""

from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from their_package.data import Blobs
from their_package.nets import Net

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

if __name__ == "__main__":
    seed_everything(0)
    best = ModelCheckpoint("checkpoints", "mine", monitor="hits", mode="max")
    Trainer(max_epochs=3, callbacks=[best], **QUIET).fit(Net(width=48), Blobs())
