"""Training images outside of a Trainer: augmented, without labels, shared between ranks."""

from types import SimpleNamespace

import torch

from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.data import TrainingImages, build_data
from tests.datasets import write_images


def cifar(folder):
    write_images(folder / "cifar10" / "train", 10, 4, 32)
    return build_data("cifar10", data_dir=str(folder), batch_size=6)


def test_they_are_augmented_anew_and_what_else_is_read_is_not(tmp_path):
    data = cifar(tmp_path)
    images = TrainingImages(data)
    assert len(images) == 36 // 6
    first, second = (torch.cat(list(images)) for _ in range(2))
    assert first.shape == second.shape == (36, 3, 32, 32)
    assert not torch.equal(first, second)
    whole = data.calibration_images("data", 36)
    exact = {tuple(image.flatten()[:40].tolist()) for image in whole}
    assert sum(tuple(image.flatten()[:40].tolist()) in exact for image in first) < 18
    batch = data.splits["train"][0]
    untouched, _ = data.on_after_batch_transfer((batch[0][None], batch[1][None]), 0)
    assert torch.equal(untouched, data.normalise(batch[0][None]))


def test_each_rank_has_its_share(tmp_path):
    data = build_data("digits", batch_size=10)
    shares = []
    for rank in range(2):
        images = TrainingImages(data, ranks=Ranks(SimpleNamespace(global_rank=rank, world_size=2)))
        shares.append([torch.cat(list(images)) for _ in range(2)])
    (first, other), (second, _) = shares
    assert len(first) == len(second)
    assert not torch.equal(first, other), "each epoch has its own order"
    own = len(first) + len(second)
    assert own <= len(data.splits["train"])
    assert len(torch.cat([first, second]).unique(dim=0)) >= 0.99 * own
