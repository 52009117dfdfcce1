"""Training images per second: this project's loaders against the plain torchvision pipeline, same network, one run.

    python benchmarks/throughput.py                     # all cases; docs/throughput.md
    python benchmarks/throughput.py resnet56 --steps 100

Plain: PIL images through torchvision's transforms in DataLoader workers, float32. Ours: whole uint8 batches, augmented
and normalised on the device; with `--precision bf16-mixed` and channels last where the network convolves. Both train
the same LightningModule in the same Trainer. A round measures one, then the other; the ratio is the rounds' median.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier

DOCS = Path(__file__).parent.parent / "docs"
CASES = {"lenet_300_100": "fashion_mnist", "resnet56": "cifar10", "vgg16": "cifar10"}
BATCH, WARM = 128, 10  # images of a step, steps before the clock starts


class Pictures(Dataset):
    """Images and labels as torchvision's own data sets give them: a PIL image through a transform."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: T.Compose):
        self.arrays = [
            image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy() for image in images
        ]
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


class Clock(Callback):
    """Seconds from the end of step `WARM` to the end of the last."""

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Start, or stop."""
        if trainer.global_step in (WARM, trainer.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if trainer.global_step == WARM:
                self.start = time.perf_counter()
            else:
                self.seconds = time.perf_counter() - self.start


def rate(name: str, data, steps: int, precision: str, channels_last: bool, images: object) -> float:
    """Images per second in training."""
    seed_everything(0, verbose=False)
    module = ImageClassifier(name, 10, images.input_shape, lr=0.01, channels_last=channels_last)
    clock = Clock()
    trainer = Trainer(
        max_steps=WARM + steps,
        max_epochs=-1,
        precision=precision,
        callbacks=[clock],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, **({"datamodule": data} if data is images else {"train_dataloaders": data}))
    return BATCH * steps / clock.seconds


def measure(name: str, data_dir: str, steps: int, rounds: int, workers: int, precision: str) -> list[str]:
    """A row of the table."""
    ours = build_data(CASES[name], data_dir=data_dir, batch_size=BATCH)
    ours.setup("fit")
    split = ours.splits["train"]
    change = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()] if ours.source.augment else []
    change += [T.PILToTensor(), T.ToDtype(torch.float32, scale=True), T.Normalize(ours.mean, ours.std)]
    pictures = Pictures(split.images, split.labels, T.Compose(change))
    options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    plain = DataLoader(pictures, BATCH, pin_memory=torch.cuda.is_available(), **options)
    convolves = name != "lenet_300_100"
    precision = precision if convolves else "32-true"
    pairs = []
    for _ in range(rounds):
        theirs = rate(name, plain, steps, "32-true", False, ours)
        pairs.append((theirs, rate(name, ours, steps, precision, convolves, ours)))
        print(f"{name}: plain {pairs[-1][0]:,.0f} images/s, ours {pairs[-1][1]:,.0f}", flush=True)
    middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
    ratios = sorted(mine / other for other, mine in pairs)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return [name, precision, f"{middle[0]:,.0f}", f"{middle[1]:,.0f}", spread]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--data_dir", default="data", help="where the images are")
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} images, after {WARM}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the plain pipeline")
    parser.add_argument("--precision", default="bf16-mixed", help="ours, of networks that convolve")
    args = parser.parse_args()
    lines = ["| network | ours in | plain, images/s | ours, images/s | ratio |", "| --- | --- | ---: | ---: | ---: |"]
    for name in args.networks:
        row = measure(name, args.data_dir, args.steps, args.rounds, args.workers, args.precision)
        lines.append("| " + " | ".join(row) + " |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    table = (
        "\n".join(
            [
                "# Training images per second",
                "",
                f"{device}, torch {torch.__version__}, {args.workers} workers.",
                "",
                *lines,
            ]
        )
        + "\n"
    )
    print(table)
    if args.networks == list(CASES):
        (DOCS / "throughput.md").write_text(table)


if __name__ == "__main__":
    main()
