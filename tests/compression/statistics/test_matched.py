"""Synthetic images matched to a network's BatchNorms."""

import pytest
import torch
from torch import nn

from nm_lightning import compress
from nm_lightning.compression.statistics import stored
from nm_lightning.compression.statistics.calibration import Calibration
from nm_lightning.compression.statistics.matched import Norms, in_batches, made, match
from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.compression.statistics.synthetic import Synthetic, crops, dead_leaves, noise

SHAPE = (3, 16, 16)
EXAMPLE = torch.zeros(1, *SHAPE)
ASKED = Synthetic((-1.0, -1.0, -1.5), (1.0, 2.0, 1.0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own for what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nm_lightning"


@torch.no_grad()
def distance(model: nn.Module, asked: Synthetic, images: torch.Tensor) -> float:
    """How far images are, all together, from what the norms remember."""
    norms = Norms(model)
    parts = [norms.moments(asked.inputs(batch)) for batch in in_batches(images)]
    return norms.distance([sum(each) for each in zip(*parts, strict=True)], len(images)).item()


def network(seed: int = 0) -> nn.Module:
    """Small, its norms used to smooth noise."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 12 * 12, 5))
    for _ in range(50):
        model(nn.functional.avg_pool2d(torch.randn(16, 3, 18, 18), 3, 1))
    return model.eval()


def test_matching_brings_images_nearer_to_the_norms_and_keeps_their_range():
    model, start = network(), dead_leaves(12, SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = match(model, ASKED, start, 10)
    assert distance(model, ASKED, moved) < 0.7 * distance(model, ASKED, start)
    assert moved.min() >= 0 and moved.max() <= 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_distance_is_zero_where_the_norms_remember_the_batch():
    model, images = network(), dead_leaves(12, SHAPE)
    for norm in (each for each in model if isinstance(each, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(ASKED.inputs(images))  # remembers the unbiased variance, 12 x 14 x 14 values
    assert distance(model.eval(), ASKED, images) < 1e-6


@pytest.mark.parametrize("shape, kind", [(SHAPE, dead_leaves), ((3, 64, 64), crops), ((2, 64, 64), dead_leaves)])
def test_small_images_start_as_leaves_large_ones_as_crops_and_then_come_mirror_images(shape, kind):
    model = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4)).eval()
    found, _ = made(Synthetic(), model, torch.zeros(1, *shape), 7, 0, 1)
    assert (found[:4] / 255 - kind(4, shape)).abs().max() < 0.03  # one step away
    assert torch.equal(found[4:], found[:3].flip(-1))


def test_made_images_are_the_seeds_and_found_again(cache, monkeypatch):
    model = network()
    first, remark = made(ASKED, model, EXAMPLE, 8, 0, 2)
    assert first.dtype == torch.uint8 and first.shape == (8, *SHAPE) and not remark
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    file.unlink()
    assert torch.equal(first, made(ASKED, model, EXAMPLE, 8, 0, 2)[0])
    assert not torch.equal(first, made(ASKED, model, EXAMPLE, 8, 1, 2)[0])
    torch.save(first.flip(0), file)
    assert torch.equal(first.flip(0), made(ASKED, model, EXAMPLE, 8, 0, 2)[0])  # the file's
    file.write_bytes(kept[:100])
    assert torch.equal(first, made(ASKED, model, EXAMPLE, 8, 0, 2)[0])  # a broken one is made anew
    with torch.no_grad():
        model[0].bias[0] += 1e-3
    torch.save(first.flip(0), file)
    assert not torch.equal(first.flip(0), made(ASKED, model, EXAMPLE, 8, 0, 2)[0])  # of other weights


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(stored.stored("key", lambda: torch.ones(3)), torch.ones(3))


def test_a_network_without_norms_has_plain_images_and_its_report_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    result = compress(model, EXAMPLE, "reconstruct", ratio=0.5, calibration="synthetic", calibration_size=8)
    assert any("no BatchNorm" in remark for remark in result.report.remarks)
    calibration = Calibration("synthetic", EXAMPLE, 8, 0, model=model, steps=10)
    assert torch.equal(calibration.batches[0], dead_leaves(8, SHAPE).mul(255).round() / 255 * 4 - 2)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    assert torch.equal(made(ASKED, dense, EXAMPLE, 8, 1, 10)[0], noise(8, SHAPE, 1).mul(255).round().byte())
    result = compress(network(), EXAMPLE, "reconstruct", ratio=0.5, calibration="synthetic", calibration_size=8)
    assert not any("no BatchNorm" in remark for remark in result.report.remarks)


def test_nothing_removed_is_nothing_changed_by_matched_images():
    model = network()
    result = compress(model, EXAMPLE, "reconstruct", ratio=0.0, calibration="synthetic", calibration_size=8)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_no_steps_and_no_network_leave_dead_leaves(cache):
    for model, steps in ((network(), 0), (None, 10)):
        images, _ = made(ASKED, model, EXAMPLE, 4, 3, steps)
        assert torch.equal(images, dead_leaves(4, SHAPE, 3).mul(255).round().byte())
    assert not cache.exists()


def test_ranks_share_the_images_that_the_first_made():
    made_once = []

    class Strategy:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

        def broadcast(self, value):
            made_once.extend([value] if self.global_rank == 0 else [])
            return made_once[0]

    model = network()
    alone = Calibration("synthetic", EXAMPLE, 140, 0, model=model, steps=1).batches
    shares = [Calibration("synthetic", EXAMPLE, 140, 0, Ranks(Strategy(rank)), model, 1).batches for rank in range(2)]
    assert len(made_once) == 1
    assert [len(share) for share in shares] == [1, 1]
    assert torch.equal(torch.cat(alone), torch.cat(shares[0] + shares[1]))
