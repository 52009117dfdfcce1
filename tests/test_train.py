"""train.py: every config, resuming, learning, and what a checkpoint brings back."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from nm_lightning.modules import ImageClassifier, evaluate
from tests import ROOT
from tests.datasets import idx, write_images

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
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


def test_last_is_the_last_epoch_whatever_the_best_was(in_tmp):
    digits("--trainer.max_epochs", "8", "--model.lr", "0", "--model.milestones", "[]")  # no epoch beats the first
    folder = Path("runs/lenet_300_100_digits")
    assert torch.load(folder / "best.ckpt", weights_only=True)["epoch"] == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 7


def test_a_checkpoint_rebuilds_its_module(in_tmp):
    digits("--trainer.max_epochs", "3")
    module = ImageClassifier.load_from_checkpoint("runs/lenet_300_100_digits/best.ckpt", weights_only=True)
    assert (module.hparams.name, module.hparams.input_shape) == ("lenet_300_100", (1, 8, 8))
    data = train.build_data("digits")
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
