"""NeuronMergeCallback in a Trainer: what it logs, saves and leaves behind."""

import copy
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import nm_lightning
from callbacks import NeuronMergeCallback
from nm_lightning.data import build_data
from nm_lightning.errors import InputError
from nm_lightning.modules import Compressible, ImageClassifier, evaluate
from nm_lightning.reporting.weights_and_biases import offline_without_account
from tests.datasets import write_colours
from tests.processes import environment


def fit(folder, callback, logger=None, epochs=3, module=None, precision="32-true", **data):
    module = module or ImageClassifier("lenet_300_100", 10, (1, 8, 8), lr=0.05)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        logger=logger or CSVLogger(folder),
        callbacks=[callback, ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max")],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=5,
    )
    trainer.fit(module, **(data or {"datamodule": build_data("digits", batch_size=64)}))
    return trainer, module


def logged(folder):
    with next(Path(folder).rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return {key: float(value) for row in rows for key, value in row.items() if value and "/" in key}


@pytest.mark.parametrize("own_data", [True, False])
def test_reconstructs_on_training_images(own_data, tmp_path):
    """Our data modules give images without augmentation, others what their loader gives; no labels are read."""
    loaders = {}
    if not own_data:
        images = torch.randn(200, 1, 8, 8)
        loaders = {"train_dataloaders": DataLoader(TensorDataset(images, torch.arange(200) % 10), 64)}
        loaders["val_dataloaders"] = loaders["train_dataloaders"]
    callback = NeuronMergeCallback(method="reconstruct", criterion="output", ratio=0.7, calibration_size=150)
    fit(tmp_path, callback, **loaders)
    assert callback.result.report.sites[0].error < 0.5
    assert callback.result.model.model.ip1.out_features == 90
    values = logged(tmp_path)
    if own_data:
        assert values["accuracy/drop"] < 0.1
        narrow = ImageClassifier.load_from_checkpoint(tmp_path / "compressed.ckpt", weights_only=True)
        assert narrow.model.ip1.out_features == 90


def test_measures_logs_and_saves_what_loads(tmp_path):
    callback = NeuronMergeCallback(method="merge", criterion="l1-norm", ratio=0.5)
    _, module = fit(tmp_path, callback)
    values = logged(tmp_path)
    data = build_data("digits")
    data.setup("test")
    best = ImageClassifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    narrow = ImageClassifier.load_from_checkpoint(tmp_path / "compressed.ckpt", weights_only=True)
    assert narrow.model.ip1.out_features == 150
    for when, network in (("before", best), ("after", narrow)):
        accuracy = evaluate(network, data.test_dataloader(), data)
        assert values[f"accuracy/{when}"] == pytest.approx(accuracy, abs=1e-6)
        assert values[f"parameters/{when}"] == sum(p.numel() for p in network.parameters())
    assert values["macs/before"] == 64 * 300 + 300 * 100 + 100 * 10
    assert values["macs/after"] == 64 * 150 + 150 * 50 + 50 * 10
    assert module.model.ip1.out_features == 300, "the Trainer's module stays as it was"


def test_replace_leaves_a_narrow_module_that_trains_on(tmp_path):
    torch.manual_seed(0)
    _, module = fit(tmp_path / "first", NeuronMergeCallback(ratio=0.8, replace=True))
    assert module.model.ip1.out_features == 60
    assert module.model.ip1.training
    before = module.model.ip2.weight.detach().clone()
    after_merge = logged(tmp_path / "first")["accuracy/after"]
    second = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        callbacks=[ModelCheckpoint(tmp_path / "second", "tuned")],
        enable_progress_bar=False,
    )
    data = build_data("digits", batch_size=64)
    second.fit(module, datamodule=data)
    assert not torch.equal(module.model.ip2.weight, before)
    tuned = ImageClassifier.load_from_checkpoint(tmp_path / "second" / "tuned.ckpt", weights_only=True)
    assert tuned.model.ip1.out_features == 60
    data.setup("test")
    assert evaluate(tuned, data.test_dataloader(), data) > after_merge


def test_finetunes_on_all_training_images_augmented(tmp_path):
    seen = []
    callback = Watching(seen, method="prune", ratio=0.5, finetune=2, finetune_on="training")
    fit(tmp_path, callback, module=Users(), epochs=1, datamodule=Augmenting(seen))
    after = seen[seen.index("end") + 1 :]
    assert sum(after) == 2 * 4, "two passes over four batches, augmented"
    assert not after[-1] and not after[0], "what is measured by is not"


class Users(LightningModule):
    """A LightningModule that knows nothing of this project."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Ready(Compressible, Users):
    """The same with the one-line mixin."""


@pytest.mark.parametrize("kind", [Users, Ready])
def test_a_users_module_with_plain_loaders(kind, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(300, 1, 8, 8)
    labels = images.flatten(1)[:, :10].argmax(1)
    loader = DataLoader(TensorDataset(images, labels), 50)
    callback = NeuronMergeCallback(ratio=0.5)
    fit(tmp_path, callback, module=kind(), train_dataloaders=loader, val_dataloaders=loader)
    if kind is Ready:
        narrow = Ready.load_from_checkpoint(tmp_path / "compressed.ckpt", weights_only=True)
    else:
        narrow = nm_lightning.load(tmp_path / "compressed.ckpt", into=Users())
    assert narrow.net[1].out_features == 20
    assert evaluate(narrow, loader) == pytest.approx(logged(tmp_path)["accuracy/after"], abs=1e-6)


def test_without_class_labels_it_compresses_all_the_same(tmp_path):
    class Regression(Users):
        def training_step(self, batch, index):
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val/accuracy", 0.0)

    loader = DataLoader(TensorDataset(torch.randn(20, 1, 8, 8), torch.randn(20, 10)), 10)
    fit(tmp_path, NeuronMergeCallback(ratio=0.5), module=Regression(), train_dataloaders=loader, val_dataloaders=loader)
    assert set(logged(tmp_path)) >= {"parameters/before", "parameters/after", "macs/before", "macs/after"}
    assert nm_lightning.load(tmp_path / "compressed.ckpt", into=Regression()).net[1].out_features == 20


def test_wandb_works_offline_without_an_account(tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    offline_without_account()
    logger = WandbLogger(project="nm-lightning", save_dir=tmp_path)
    fit(tmp_path, NeuronMergeCallback(ratio=0.5), logger, epochs=1)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert 0 < summary["accuracy/after"] <= 1
    assert 0 < summary["accuracy/before"] <= 1
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "melt"}, "unknown method 'melt'"),
        ({"criterion": "l3-norm"}, "unknown criterion"),
        ({"ratio": 1.5}, "ratio 1.5"),
        ({"ratio": "half"}, "ratio 'half'"),
        ({"threshold": -1}, "threshold -1"),
    ],
)
def test_bad_settings_are_refused_before_training(settings, says):
    with pytest.raises(InputError, match=says):
        NeuronMergeCallback(**settings)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize(("method", "refit"), [("merge", 0), ("reconstruct", 0), ("prune", 1)])
def test_compresses_in_at_least_float32(precision, method, refit, tmp_path):
    """Whatever the Trainer's precision, weights are those of the best checkpoint compressed in float32 or float64."""
    callback = NeuronMergeCallback(method, ratio=0.5, calibration_size=200, refit=refit)
    _, module = fit(tmp_path, callback, epochs=1, precision=precision)
    kept = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    found = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in found.values()} == {kept} == {module.dtype}
    exact = torch.float64 if precision == "64-true" else torch.float32
    original = ImageClassifier("lenet_300_100", 10, (1, 8, 8)).to(exact)
    original.load_state_dict(best)
    calibration = build_data("digits", batch_size=64).calibration_images("data", 200)
    example = original.example_input.to(exact)
    wanted = nm_lightning.compress(original, example, method, calibration=calibration, refit=refit).model
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found[name], value.to(kept), rtol=1e-5, atol=1e-6)
    assert logged(tmp_path)["accuracy/after"] > 0.5


class Cropped(Users):
    """Tied layers, and a data module that augments while the Trainer trains."""

    def __init__(self):
        super().__init__()
        self.head = self.net
        self.again = nn.Linear(40, 10)
        self.again.weight = self.net[3].weight


class Augmenting(LightningDataModule):
    def __init__(self, seen):
        super().__init__()
        self.seen, self.images = seen, torch.randn(64, 1, 8, 8)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, torch.arange(64) % 10), 16)

    val_dataloader = test_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen.append(self.trainer.training)
        return batch


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_test_images_are_not_augmented_and_aliases_are_replaced(precision, tmp_path):
    seen = []
    module = Cropped()
    fit(tmp_path, Watching(seen, ratio=0.5, replace=True), module=module, precision=precision, epochs=1,
        datamodule=Augmenting(seen))  # fmt: skip
    after = seen[seen.index("end") + 1 :]
    assert after and not any(after)
    assert module.head is module.net and module.net[1].out_features == 20


class Watching(NeuronMergeCallback):
    def __init__(self, seen, **settings):
        super().__init__(**settings)
        self.seen = seen

    def on_fit_end(self, trainer, pl_module):
        self.seen.append("end")
        super().on_fit_end(trainer, pl_module)


def test_a_failing_wandb_loses_nothing(tmp_path):
    with pytest.warns(UserWarning, match="W&B failed, all else is complete: gone"):
        fit(tmp_path, NeuronMergeCallback(), logger=[CSVLogger(tmp_path), Failing()], epochs=1)
    assert (tmp_path / "compressed.ckpt").is_file() and (tmp_path / "compressed.html").is_file()


class Failing(WandbLogger):
    """A W&B whose server is gone when training ends."""

    def __init__(self):
        pass

    name = version = save_dir = "none"

    def log_hyperparams(self, *_, **__):
        pass

    log_graph = save = finalize = after_save_checkpoint = watch = log_hyperparams

    def log_metrics(self, metrics, step=None):
        if "accuracy/after" in metrics:
            raise ConnectionError("gone")


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, None])
def test_reparametrised_layers(change, tmp_path):
    module = Users()
    if change:
        change(module.net[1])
    else:
        nn.utils.prune.l1_unstructured(module.net[1], "weight", 0.3)
    data = {"train_dataloaders": DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10), 16)}
    callback = NeuronMergeCallback("prune")
    fit(tmp_path, callback, module=module, epochs=1, val_dataloaders=data["train_dataloaders"], **data)
    assert callback.result.model.net[1].out_features == 20


def test_replaced_and_fitted_again_by_the_same_trainer(tmp_path):
    trainer, module = fit(tmp_path, NeuronMergeCallback(ratio=0.5, replace=True), epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=build_data("digits", batch_size=64))
    assert module.model.ip1.out_features == 75


TRAINING = """
import hashlib, json, sys
from pathlib import Path
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from callbacks import NeuronMergeCallback
from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier

def digest(module):
    whole = hashlib.sha256()
    for name, value in module.state_dict().items():
        whole.update(name.encode() + value.cpu().numpy().tobytes())
    return whole.hexdigest()

seed_everything(0)
method, replace = sys.argv[1], sys.argv[2] == "replace"
callback = NeuronMergeCallback(method, ratio=0.5, calibration_size=300, replace=replace)
module = ImageClassifier("resnet8", 3, (3, 16, 16), lr=0.02)
data = build_data("folder", data_dir="images", image_size=16, batch_size=8, num_workers=0)
folder = f"trained-{method}"
def trainer(callback, epochs, folder, loggers):
    best = ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, logger=loggers,
                   callbacks=[best, *callback], **quiet)
first = trainer([callback], 2, folder, [CSVLogger(folder), WandbLogger(save_dir=folder, offline=True)])
first.fit(module, datamodule=data)
found = {"compressed": digest(callback.result.model), "module": digest(module)}
tested = first.test(module, datamodule=data, verbose=False)[0]["test/accuracy"]
if replace:
    second = trainer([], 1, folder + "-again", False)
    second.fit(module, datamodule=data)
    found["tuned"] = digest(module)
    found["optimised"] = sum(p.numel() for group in second.optimizers[0].param_groups for p in group["params"])
    found["parameters"] = sum(p.numel() for p in module.parameters())
Path(f"{method}-{first.global_rank}.json").write_text(json.dumps({**found, "tested": tested}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of three classes, which two ranks can't share evenly."""
    place = tmp_path_factory.mktemp("ranks")
    write_colours(place / "images", {"train": 400, "test": 41})
    return place


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("method", "replace"), [("merge", True), ("reconstruct", False)])
def test_the_callback_after_training_on_two_ranks(method, replace, place):
    script = place / "training.py"
    script.write_text(TRAINING)
    arguments = [sys.executable, str(script), method, "replace" if replace else "keep"]
    done = subprocess.run(arguments, cwd=place, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((place / f"{method}-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1], "the ranks' networks differ"
    folder = place / f"trained-{method}"
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "compressed.ckpt"]
    assert len(list(folder.rglob("offline-run-*"))) == 1

    best = ImageClassifier.load_from_checkpoint(folder / "best.ckpt", weights_only=True)
    narrow = ImageClassifier.load_from_checkpoint(folder / "compressed.ckpt", weights_only=True)
    data = build_data("folder", data_dir=str(place / "images"), image_size=16, batch_size=8, num_workers=0)
    data.setup("test")
    calibration = data.calibration_images("data", 300) if method == "reconstruct" else None
    single = nm_lightning.compress(
        best, best.example_input, method, ratio=0.5, calibration=calibration
    ).model.state_dict()
    for key, value in narrow.state_dict().items():
        if method == "merge":
            assert torch.equal(value, single[key]), key
        else:
            torch.testing.assert_close(value, single[key], rtol=1e-5, atol=1e-5)
    (line,) = (line for line in done.stderr.splitlines() if "accuracy" in line and "saved" in line)
    exact = [evaluate(network, data.test_dataloader(), data) for network in (best, narrow)]
    assert f"accuracy {100 * exact[0]:.2f} % to {100 * exact[1]:.2f} %" in line
    if replace:
        assert ranks[0]["tested"] == pytest.approx(exact[1], abs=1e-6), "Lightning's own test counts an image twice"
        assert ranks[0]["tuned"] != ranks[0]["module"]
        assert ranks[0]["optimised"] == ranks[0]["parameters"] == sum(p.numel() for p in narrow.parameters())


def test_what_would_fail_after_training_is_refused_before_it():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    with pytest.raises(InputError, match="replace=True does not reach back from spawned processes"):
        NeuronMergeCallback(replace=True).setup(trainer, None, "fit")
    with pytest.raises(InputError, match="calibration_size 1 leaves some of 2 ranks without an image"):
        NeuronMergeCallback("reconstruct", calibration_size=1).setup(trainer, None, "fit")
    trainer.strategy.__class__ = FSDPStrategy  # which can't be made without a GPU
    with pytest.raises(InputError, match=r"FSDPStrategy shards the weights.*compress.py --checkpoint"):
        NeuronMergeCallback().setup(trainer, None, "fit")
    with pytest.raises(InputError, match="calibration_size 0"):
        NeuronMergeCallback("reconstruct", calibration_size=0)


IMAGES = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BRIGHT = (IMAGES.mean((1, 2, 3)) > 0).long()


class Dicts(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"picture": IMAGES[index], "label": BRIGHT[index], "name": str(index)}


class Own(LightningModule):
    """Two hidden layers; a subclass says what hangs on them."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.body(images))

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch):
        self.log("val/accuracy", -self.loss(batch))

    def test_step(self, batch, index):
        self.validation_step(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class WithObjects(Own):
    def __init__(self, act=nn.ReLU, loss=nn.CrossEntropyLoss(), root=Path("data"), lr=np.float32(1e-2)):  # noqa: B008
        super().__init__()
        self.save_hyperparameters()


class OfDicts(Own):
    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch["picture"]), batch["label"])


class TrainsMore(Own):
    """A projection, centres and a frozen teacher, which only the training step knows."""

    def __init__(self, lr=1e-2):
        super().__init__(lr)
        self.projection = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.register_buffer("centres", torch.zeros(2, 16))
        self.teacher = copy.deepcopy(self.body)

    def loss(self, batch):
        features = self.body(batch[0])
        apart = (self.projection(features) - self.projection(self.teacher(batch[0]))).square().mean()
        return super().loss(batch) + apart + (features - self.centres[batch[1]]).square().mean()


class Gained(Own):
    def __init__(self, lr=1e-2):
        super().__init__(lr)
        self.gain = nn.Parameter(torch.ones(16))
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, images):
        return self.head(self.body(images) * self.gain + self.shift)


class Averaged(Own):
    def __init__(self, lr=1e-2):
        super().__init__(lr)
        self.average = torch.optim.swa_utils.AveragedModel(self.body)
        self.accuracy = MulticlassAccuracy(2)

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.body)

    def training_step(self, batch, index):
        self.accuracy(self(batch[0]), batch[1])
        self.log("train/accuracy", self.accuracy)
        return self.loss(batch)


class Normed(Own):
    def __init__(self, lr=1e-2):
        super().__init__(lr)
        nn.utils.parametrizations.weight_norm(self.body[1])
        nn.utils.weight_norm(self.body[3])


class Keeps(Own):
    """Its forward keeps what it computed, for a regulariser of its own."""

    def forward(self, images):
        self.features = self.body(images)
        return self.head(self.features)

    def loss(self, batch):
        return super().loss(batch) + 1e-3 * self.features.square().mean()


KINDS = (TrainsMore, Gained, Averaged, Normed, Keeps)
OURS = {kind: type(f"Ready{kind.__name__}", (Compressible, kind), {}) for kind in KINDS}


def quick(folder, callback=None, epochs=1, monitor="val/accuracy"):
    callbacks = [ModelCheckpoint(folder, "best", monitor=monitor), *([callback] if callback else [])]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=callbacks, logger=CSVLogger(folder), log_every_n_steps=1, **quiet)


def loaders(*labels, data=None):
    data = data or TensorDataset(IMAGES, *(labels or (BRIGHT,)))
    return DataLoader(data, 16, shuffle=True), DataLoader(data, 16)


def agree(one, other):
    assert torch.allclose(one.eval()(IMAGES), other.eval()(IMAGES), atol=1e-6)


def test_hyper_parameters_that_are_objects(tmp_path):
    """They are left out of our file, which is said, and the file loads without pickle."""
    callback = NeuronMergeCallback("prune")
    quick(tmp_path, callback).fit(WithObjects(), *loaders())
    found = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["hyper_parameters"]
    assert found == {"root": "data", "lr": pytest.approx(1e-2)}
    assert [note.partition(" is no plain data")[0] for note in callback.result.report.notes] == [
        "hyper_parameters: act",
        "hyper_parameters: loss",
    ]
    agree(nm_lightning.load(tmp_path / "compressed.ckpt", into=WithObjects()), callback.result.model)


@pytest.mark.parametrize("method", ["prune", "reconstruct"])
def test_batches_that_are_dicts(method, tmp_path):
    callback = NeuronMergeCallback(method, input_key="picture", calibration_size=64)
    quick(tmp_path, callback).fit(OfDicts(), *loaders(data=Dicts()))
    model = callback.result.model.eval()
    assert logged(tmp_path)["accuracy/after"] == pytest.approx(
        float((model(IMAGES).argmax(1) == BRIGHT).float().mean())
    )


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", list(OURS))
def test_a_replaced_module_goes_on(kind, ours, tmp_path):
    """Fit, test, save and load, whatever hangs on the module beside its forward."""
    kind = OURS[kind] if ours else kind
    module, callback = kind(), NeuronMergeCallback("merge", ratio=0.5, replace=True)
    quick(tmp_path, callback).fit(module, *loaders())
    assert module.body[1].out_features == 12
    agree(module, callback.result.model)
    agree(nm_lightning.load(tmp_path / "compressed.ckpt", into=kind()), module)
    second = quick(tmp_path / "second")
    second.fit(module.train(), *loaders())
    second.test(module, loaders()[1], verbose=False)
    second.save_checkpoint(tmp_path / "saved.ckpt")
    if ours:
        loaded = kind.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
        agree(loaded, module)
        quick(tmp_path / "third").fit(loaded.train(), *loaders())


def test_what_only_the_training_step_reads_stays_whole(tmp_path):
    callback = NeuronMergeCallback("prune")
    quick(tmp_path, callback).fit(TrainsMore(), *loaders())
    skipped = callback.result.report.skipped
    assert callback.result.report.widths == {"body.1": 12}
    assert skipped["body.3"].startswith("training_step reads its neurons beside forward: ")
    assert skipped["projection.0"] == skipped["teacher.1"] == "forward does not read it: left as it is"


@pytest.mark.parametrize("how", ["fit(torch.compile(module))", "module.compile()"])
def test_a_compiled_module(how, tmp_path):
    """The file that is saved is what was measured, and the result has weights of its own."""
    torch.manual_seed(0)  # of some draws the neurons that stay are silent
    module, callback = Own(), NeuronMergeCallback("prune", ratio=0.9)
    fitted = torch.compile(module, backend="eager") if "torch" in how else module
    if fitted is module:
        module.compile(backend="eager")
    quick(tmp_path, callback, epochs=2).fit(fitted, *loaders())
    loaded = nm_lightning.load(tmp_path / "compressed.ckpt", into=Own()).eval()
    assert logged(tmp_path)["accuracy/after"] == pytest.approx(
        float((loaded(IMAGES).argmax(1) == BRIGHT).float().mean())
    )
    agree(loaded, callback.result.model)
    nn.init.zeros_(callback.result.model.head.weight)
    assert not torch.allclose(callback.result.model(IMAGES), loaded(IMAGES))


class ManyLabels(Own):
    def loss(self, batch):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch):
        right = ((self(batch[0]) > 0) == batch[1].bool()).float()
        self.log_dict({"val/loss": self.loss(batch), "val/right": right.mean()})


def test_other_labels_are_measured_by_the_modules_own_steps(tmp_path):
    many = torch.stack([BRIGHT, 1 - BRIGHT], 1).float()
    callback = NeuronMergeCallback("prune", ratio=0.25)
    quick(tmp_path, callback, monitor="val/right").fit(ManyLabels(), *loaders(many))
    values, model = logged(tmp_path), callback.result.model.eval()
    assert "accuracy/after" not in values
    assert values["val/right/after"] == pytest.approx(float(((model(IMAGES) > 0) == many.bool()).float().mean()))
    assert set(values) >= {"val/right/before", "val/loss/before", "val/loss/after"}


class Untraceable(Own):
    def forward(self, images):
        return super().forward(images) if images.sum() > 0 else super().forward(-images)


class OnlyAHead(Own):
    def forward(self, images):
        return self.head(images.flatten(1)[:, :16])


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (Untraceable, {}, "decides by an activation's values"),
        (OnlyAHead, {}, "nothing in OnlyAHead can be compressed"),
        (Own, {"widths": {"body.1": 99}}, "width 99 for body.1"),
        (Own, {"sites": ["net.*"]}, "'net.*' matches none"),
        (Own, {"target_parameters": 0.001}, "can't bring the network below"),
        (Own, {"method": "reconstruct", "calibration": torch.zeros(9, 3)}, "calibration images are (3,)"),
        (OfDicts, {}, "no tensor of inputs: give input_key"),
    ],
)
def test_a_refusal_comes_before_training(kind, settings, says, tmp_path):
    data = Dicts() if kind is OfDicts else None
    module, seen = kind(), []
    module.on_train_batch_start = lambda *_: seen.append("trained")
    with pytest.raises(InputError) as caught:
        quick(tmp_path, NeuronMergeCallback(**settings)).fit(module, *loaders(data=data))
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not seen


def test_the_rehearsal_changes_nothing(tmp_path):
    """Random numbers, modes, norms' statistics and the order of the images are those of a training without it."""
    trained = []
    for callback in (NeuronMergeCallback("prune"), None):
        torch.manual_seed(0)
        module = Own()
        module.body[2] = nn.Sequential(nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5))
        module.body[4].eval()
        generator = torch.Generator().manual_seed(1)
        train = DataLoader(TensorDataset(IMAGES, BRIGHT), 16, shuffle=True, generator=generator)
        quick(tmp_path, callback).fit(module, train, loaders()[1])
        trained.append(module)
    assert all(torch.equal(one, trained[1].state_dict()[name]) for name, one in trained[0].state_dict().items())


def test_a_full_disk_after_training_loses_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise InputError("checkpoint 'compressed.ckpt' can't be written (No space left on device)")

    monkeypatch.setattr("nm_lightning.callbacks.write", full)
    module, callback = Own(), NeuronMergeCallback("prune", replace=True)
    with pytest.warns(UserWarning, match=r"No space left on device.*the callback's result holds the network"):
        quick(tmp_path, callback).fit(module, *loaders())
    assert "accuracy/after" in logged(tmp_path)
    assert module.body[1].out_features == callback.result.model.body[1].out_features == 12
    assert (tmp_path / "best.ckpt").is_file()
