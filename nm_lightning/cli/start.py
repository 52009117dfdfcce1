"""Training that starts from a checkpoint: its network, widths, weights and data, with a new optimiser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nm_lightning.cli.arguments import hyper_parameters
from nm_lightning.cli.sources import located
from nm_lightning.compression.files.checkpoint import load_weights, read
from nm_lightning.errors import InputError
from nm_lightning.modules import ImageClassifier

SAME_IMAGES = ("name", "val_fraction", "seed", "image_size", "mean", "std")  # so that validation images are new to it


@dataclass
class Start:
    """A checkpoint of ours, compressed or not.

    Attributes:
        path: the file.
        content: of it.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def at(cls, checkpoint: str) -> "Start":
        """Read a file, or one of the repository's checkpoints by its name.

        Raises:
            InputError: there is none, or it does not say which network it holds.
        """
        path = located(checkpoint)
        found = cls(path, read(path))
        if "name" not in found.module or not isinstance(found.content.get("state_dict"), dict):
            raise InputError(f"checkpoint {str(path)!r} does not say its network: give one of train.py or compress.py")
        return found

    @property
    def module(self) -> dict[str, Any]:
        """The module's hyper-parameters."""
        return hyper_parameters(self.content)

    @property
    def data(self) -> dict[str, Any]:
        """The data module's hyper-parameters."""
        return hyper_parameters(self.content, "datamodule_hyper_parameters")

    def defaults(self) -> dict[str, Any]:
        """What train.py's options are where nothing else is said."""
        found = {f"data.{name}": self.data[name] for name in SAME_IMAGES if name in self.data}
        names = [self.module["name"].replace("/", "_"), *([self.data["name"]] if "name" in self.data else [])]
        experiment = "_".join([*names, "from", self.path.stem])  # a folder of its own, not the original's
        network = {"model.name": self.module["name"], "model.widths": self.module.get("widths")}
        return {**network, **found, "experiment": experiment}

    def fill(self, module: ImageClassifier) -> None:
        """Give a network, built at its whole width, the checkpoint's widths and weights.

        Raises:
            InputError: the checkpoint is of another network, or was trained for other images.
        """
        for label in ("name", "num_classes", "input_shape"):
            own, here = self.module.get(label), module.hparams[label]
            if own is not None and own != here:
                raise InputError(f"checkpoint {str(self.path)!r} was trained for {label} {own}, this run has {here}")
        module.on_load_checkpoint(self.content)
        load_weights(module, self.content["state_dict"], self.path)
