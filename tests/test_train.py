"""train.py: every config, resuming, learning, and what a checkpoint brings back."""

import gzip
from math import cos, pi
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from torch.nn import functional as F

from nm_lightning.cli import train
from nm_lightning.data import build_data
from nm_lightning.data.base import cutout
from nm_lightning.data.small import crop_and_flip
from nm_lightning.errors import InputError
from nm_lightning.modules import ImageClassifier, evaluate
from tests import ROOT
from tests.cli import run
from tests.datasets import idx, write_images

CONFIGS = sorted({path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"finetune"})  # which names no network
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SHORT = [*QUICK, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
SHORT += ["--trainer.limit_test_batches", "1", "--trainer.num_sanity_val_steps", "0", "--data.batch_size", "4"]


def made_on_the_spot(name, folder):
    """A tiny data set in the real one's form."""
    if name == "fashion_mnist":
        random = np.random.default_rng(0)
        for split in ("train", "t10k"):
            pixels, labels = random.integers(0, 256, (40, 28, 28)), random.integers(0, 10, 40)
            for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
                (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(values)))
    elif name.startswith("cifar"):
        for split in ("train", "test"):
            write_images(folder / name / split, int(name.removeprefix("cifar")), 2, 32)
    elif name == "imagenet":
        for split in ("train", "val"):
            write_images(folder / split, 5, 2, 256)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_trains(config, in_tmp):
    path = ROOT / "configs" / f"{config}.yaml"
    name = yaml.safe_load(path.read_text())["data"]["name"]
    made_on_the_spot(name, in_tmp)
    train.main(["--config", str(path), *SHORT, "--data.data_dir", str(in_tmp), "--data.num_workers", "0"])
    assert {"best.ckpt", "last.ckpt"} <= {file.name for file in (in_tmp / "runs" / config).iterdir()}
    assert (in_tmp / "runs" / config / "config.yaml").is_file()
    assert (in_tmp / "runs" / config / "version_0" / "metrics.csv").is_file()


def test_no_arguments_mean_lenet_on_fashion_mnist(in_tmp, fashion_mnist, capsys):
    """The promise of the README: at least 89 % after 15 epochs."""
    train.main(QUICK)
    assert (in_tmp / "runs" / "lenet_300_100_fashion_mnist" / "best.ckpt").is_file()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy"))
    assert float(line.split()[2]) >= 89


def digits(*arguments):
    train.main(["--config", str(ROOT / "configs" / "lenet_300_100_digits.yaml"), *QUICK, *arguments])


def test_training_is_repeated_from_its_seed(in_tmp):
    states = []
    for name in ("first", "second"):
        digits("--trainer.max_epochs", "2", "--experiment", name)
        states.append(torch.load(f"runs/{name}/last.ckpt", weights_only=True)["state_dict"])
    first, second = states
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_training_resumes(in_tmp):
    digits("--trainer.max_epochs", "2")
    last = Path("runs/lenet_300_100_digits/last.ckpt")
    steps = torch.load(last, weights_only=True)["global_step"]
    digits("--trainer.max_epochs", "3", "--ckpt_path", str(last))
    resumed = torch.load(last, weights_only=True)
    assert resumed["epoch"] == 2
    assert resumed["global_step"] == steps // 2 * 3


@pytest.fixture
def compressed(trained, in_tmp):
    """A pruned network's checkpoint, and its accuracy."""
    report = run(trained, in_tmp / "out", "--method", "prune", "--ratio", "0.8")
    return in_tmp / "out" / "prune_l2-norm_0.8.ckpt", report["results"][0]["accuracy"]


def test_training_starts_from_a_compressed_checkpoint(compressed, in_tmp, capsys):
    """Network, widths, weights and data are the checkpoint's, the rest is configs/finetune.yaml's."""
    path, before = compressed
    train.main(["--from", str(path), *QUICK, "--trainer.max_epochs", "3"])
    folder = in_tmp / "runs" / "lenet_300_100_digits_from_prune_l2-norm_0.8"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["model"]["lr"], written["model"]["schedule"], written["data"]["name"]) == (
        0.02,
        "one_cycle",
        "digits",
    )
    tuned = ImageClassifier.load_from_checkpoint(folder / "best.ckpt", weights_only=True)
    assert (tuned.model.ip1.out_features, tuned.model.ip2.out_features) == (60, 20)
    data = train.build_data("digits")
    data.setup("test")
    assert evaluate(tuned, data.test_dataloader(), data) > before + 0.02

    whole = {
        key: value.clone() for key, value in torch.load(folder / "last.ckpt", weights_only=True)["state_dict"].items()
    }
    (in_tmp / "again.yaml").write_text(f"from: {path}\ntrainer: {{max_epochs: 3}}\nexperiment: again\n")
    for more in (["--trainer.max_epochs", "3"], ["--ckpt_path", str(in_tmp / "runs" / "again" / "last.ckpt")]):
        train.main(["--config", str(in_tmp / "again.yaml"), *QUICK, *more])
    again = torch.load(in_tmp / "runs" / "again" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, whole[key]) for key, value in again.items())


def test_what_was_trained_on_after_a_compression_is_resumed_by_itself(compressed, in_tmp):
    train.main(["--from", str(compressed[0]), *QUICK, "--trainer.max_epochs", "1", "--model.schedule", "steps"])
    last = in_tmp / "runs" / "lenet_300_100_digits_from_prune_l2-norm_0.8" / "last.ckpt"
    digits("--ckpt_path", str(last), "--trainer.max_epochs", "2", "--model.decay_all", "false")
    resumed = torch.load("runs/lenet_300_100_digits/last.ckpt", weights_only=True)
    assert resumed["epoch"] == 1
    assert resumed["state_dict"]["model.ip1.weight"].shape == (60, 64)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "missing.ckpt"], "'missing.ckpt' does not exist"),
        (["--from", "vgg19_cifar100"], "does not exist: give a file, or one of resnet20_cifar10"),
        (["--from", "weights.ckpt"], "'weights.ckpt' does not say its network"),
        (
            ["--from", "{trained}", "--model.name", "resnet20"],
            "for name lenet_300_100, this run has resnet20",
        ),
        (["--from", "{trained}", "--data.name", "fashion_mnist"], "was trained for input_shape (1, 8, 8)"),
    ],
)
def test_a_start_that_does_not_fit_is_one_line(arguments, says, trained, in_tmp, fashion_mnist, capsys):
    torch.save({"state_dict": {}}, "weights.ckpt")
    with pytest.raises(SystemExit) as exit_:
        train.main([*QUICK, *(word.format(trained=trained) for word in arguments)])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]


def test_one_cycle_rises_and_falls_step_by_step():
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=4, callbacks=[Watch()], limit_val_batches=0, enable_model_summary=False, **quiet)
    module = ImageClassifier("lenet_300_100", 10, (1, 8, 8), lr=0.5, schedule="one_cycle")
    trainer.fit(module, build_data("digits", batch_size=64))
    steps = 4 * 20
    lowest, highest, last = 0.5 / 25, 0.5, 0.5 / 25 / 1e4
    top = 0.3 * steps - 1
    up = [highest + (lowest - highest) * (1 + cos(pi * step / top)) / 2 for step in range(24)]
    down = [last + (highest - last) * (1 + cos(pi * (step - top) / (steps - 1 - top))) / 2 for step in range(24, steps)]
    assert rates == pytest.approx(up + down, abs=1e-12)


def test_adamw_decays_what_it_is_told_to():
    """A step without a gradient only decays: by rate times decay, norms and biases not at all."""
    module = ImageClassifier("vit_32_1", 10, (1, 8, 8), lr=0.1, weight_decay=0.5, optimizer="adamw", decay_all=False)
    before = {name: value.clone() for name, value in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    configured = module.configure_optimizers()
    configured["optimizer"].step()
    for name, value in module.named_parameters():
        expected = before[name] * (0.95 if value.ndim > 1 else 1.0)
        assert torch.allclose(value, expected), name


CYCLE = ["--model.schedule", "one_cycle", "--model.nesterov", "true", "--model.decay_all", "false"]
CYCLE += ["--model.label_smoothing", "0.1", "--data.cutout", "3", "--trainer.max_epochs", "5"]


def test_a_cycle_that_was_broken_off_ends_with_the_same_weights(in_tmp, monkeypatch):
    digits(*CYCLE, "--experiment", "whole")

    def power_cut(module):
        if module.current_epoch == 3:
            raise SystemExit

    with monkeypatch.context() as context, pytest.raises(SystemExit):
        context.setattr(ImageClassifier, "on_train_epoch_start", power_cut)
        digits(*CYCLE, "--experiment", "parts")
    assert torch.load("runs/parts/last.ckpt", weights_only=True)["epoch"] == 2
    digits(*CYCLE, "--experiment", "parts", "--ckpt_path", "runs/parts/last.ckpt")
    whole, parts = (torch.load(f"runs/{name}/last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert parts["epoch"] == 4
    assert all(torch.equal(value, parts["state_dict"][key]) for key, value in whole["state_dict"].items())


def test_a_cycle_has_one_length(in_tmp, capsys):
    digits(*CYCLE, "--trainer.max_epochs", "2")
    with pytest.raises(SystemExit):
        digits(*CYCLE, "--trainer.max_epochs", "3", "--ckpt_path", "runs/lenet_300_100_digits/last.ckpt")
    assert "error: the checkpoint's cycle has 40 steps, not 60: give its max_epochs" in capsys.readouterr().err


def test_norms_and_biases_are_not_decayed():
    module = ImageClassifier("resnet20", 10, (3, 32, 32), weight_decay=0.1, decay_all=False)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decay) == len(list(module.parameters()))
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            weight = isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and name == "weight"
            assert decay[parameter] == (0.1 if weight else 0)


def test_labels_are_smoothed_in_training_alone(monkeypatch):
    module = ImageClassifier("lenet_300_100", 10, (1, 8, 8), label_smoothing=0.2)
    losses = {}
    monkeypatch.setattr(module, "log", lambda name, value, **how: losses.update({name: value}))
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    for step in (module.training_step, module.validation_step, module.test_step):
        step((images, labels), 0)
    logits = module(images)
    smooth = 0.8 * F.cross_entropy(logits, labels) - 0.2 * logits.log_softmax(1).mean()
    assert losses["train/loss"].item() == pytest.approx(smooth.item())
    assert losses["val/loss"] == losses["test/loss"] == F.cross_entropy(logits, labels)


def test_cutout_removes_one_square_of_each_training_image():
    torch.manual_seed(0)
    images = 1 + torch.rand(200, 3, 9, 7)
    results = cutout(images, 4)
    corners = set()
    for image, result in zip(images, results, strict=True):
        gone = (result == 0).all(0)
        assert torch.equal(result, image * ~gone)
        rows, columns = (gone.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        for places, length in ((rows, 9), (columns, 7)):
            assert places == list(range(places[0], places[-1] + 1))
            assert len(places) == 4 or 0 in places or length - 1 in places
        assert gone.sum() == len(rows) * len(columns) <= 16
        corners.add((rows[-1], columns[-1]))
    assert len(corners) > 40


def test_training_images_alone_are_changed():
    data = build_data("digits", cutout=4)
    batch = torch.full((8, 1, 8, 8), 200, dtype=torch.uint8), torch.arange(8)
    whole = data.normalise(batch[0])
    for training in (True, False):
        data.trainer = SimpleNamespace(training=training, lightning_module=None)
        images, _ = data.on_after_batch_transfer(batch, 0)
        assert torch.equal(images, whole) != training
        assert ((images == whole) | ((images == 0) & torch.tensor(training))).all()


def test_crops_reflect():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    results = crop_and_flip(images, crop="reflect")
    assert results.dtype == torch.uint8
    for image, result in zip(np.pad(images, [(0, 0), (0, 0), (4, 4), (4, 4)], mode="reflect"), results, strict=True):
        windows = [image[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
        assert any((window == view.numpy()).all() for window in windows for view in (result, result.flip(-1)))


@pytest.mark.parametrize(
    ("build", "settings", "says"),
    [
        (ImageClassifier, {"schedule": "cosine"}, "unknown schedule 'cosine'"),
        (ImageClassifier, {"label_smoothing": 1.0}, "label_smoothing 1.0"),
        (ImageClassifier, {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        (build_data, {"crop": "mirror"}, "crop 'mirror'"),
        (build_data, {"cutout": -1}, "cutout -1"),
    ],
)
def test_bad_recipes_are_refused(build, settings, says):
    with pytest.raises(InputError, match=says):
        build(**settings)


def test_last_is_the_last_epoch_whatever_the_best_was(in_tmp):
    digits("--trainer.max_epochs", "8", "--model.lr", "0", "--model.milestones", "[]")  # no epoch beats the first
    folder = Path("runs/lenet_300_100_digits")
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 7


def test_a_checkpoint_rebuilds_its_module(in_tmp):
    digits("--trainer.max_epochs", "3")
    module = ImageClassifier.load_from_checkpoint("runs/lenet_300_100_digits/best.ckpt", weights_only=True)
    assert (module.hparams.name, module.hparams.input_shape) == ("lenet_300_100", (1, 8, 8))
    data = build_data("digits")
    data.setup("test")
    assert evaluate(module, data.test_dataloader(), data) > 0.8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.name", "lenet"], "unknown model 'lenet'"),
        (["--data.name", "mnist"], "unknown data 'mnist'"),
        (["--data.batch_size", "0"], "batch_size 0"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["--modle.name", "lenet"], "modle"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model.name", "vgg16"], "vgg16"),
        (["--model.widths", "[3]"], "widths [3]"),
        (["--model.schedule", "cosine"], "unknown schedule 'cosine'"),
        (["--model.optimizer", "lion"], "unknown optimizer 'lion'"),
        (["--model.schedule", "one_cycle", "--trainer.max_epochs", "-1"], "one_cycle needs an end"),
        (["--data.crop", "mirror"], "crop 'mirror'"),
        (["--data.name", "imagenet"], "no imagenet images"),
        (["--ckpt_path", "missing.ckpt"], "'missing.ckpt' does not exist"),
        (["--ckpt_path", "text.ckpt"], "'text.ckpt' is truncated or not a PyTorch checkpoint"),
        (["--ckpt_path", "weights.ckpt"], "holds no state of a training run"),
        (["--trainer.callbacks+=callbacks.NeuronMergeCallback", "--trainer.callbacks.ratio", "1.5"], "ratio 1.5"),
    ],
)
def test_bad_input_is_one_line(arguments, says, in_tmp, capsys):
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, "weights.ckpt")
    with pytest.raises(SystemExit) as exit_:
        digits(*arguments)
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not list(Path(".").glob("runs/*/*.ckpt"))


def test_missing_data_is_one_line(in_tmp, no_network, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["--config", str(ROOT / "configs" / "resnet56_cifar10.yaml"), *QUICK])
    assert exit_.value.code == 2
    assert "error: no cifar10 in 'data'" in capsys.readouterr().err
