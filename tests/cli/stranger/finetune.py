"""The compressed network is loaded and trained on: `python finetune.py small.ckpt`; prints what it found as JSON."""

import json
import sys

from fit import QUIET
from pytorch_lightning import Trainer, seed_everything
from their_package.data import Blobs
from their_package.nets import Net

import nm_lightning

if __name__ == "__main__":
    seed_everything(0)
    small = nm_lightning.load(sys.argv[1], into=Net(width=48))
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    before = trainer.validate(small, Blobs(), verbose=False)[0]["hits"]
    trainer.fit(small, Blobs())
    found = {
        "width": small.net.body[1].out_features,
        "before": before,
        "after": trainer.validate(small, Blobs(), verbose=False)[0]["hits"],
        "package": nm_lightning.__file__,
    }
    print(json.dumps(found))
