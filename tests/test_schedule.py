"""Ratios one after the other while training goes on: optimisers, schedules, checkpoints, averages, ranks."""

import json
import subprocess
import sys

import pytest
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

import nm_lightning
from callbacks import NeuronMergeCallback
from nm_lightning.compression import apply_plan
from nm_lightning.data import build_data
from nm_lightning.errors import InputError
from nm_lightning.in_place import narrow_optimizer
from nm_lightning.modules import ImageClassifier, evaluate
from tests.processes import environment

RATIOS = [0.2, 0.35, 0.5]


class Watch(Callback):
    """What the module, its optimiser and its average are at the start of each epoch, after the callback's turn."""

    def __init__(self, average=None):
        self.epochs, self.rates, self.average = [], [], average

    def on_train_epoch_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        momenta = {
            name: optimizer.state[parameter]["momentum_buffer"].clone()
            for name, parameter in pl_module.named_parameters()
            if parameter in optimizer.state
        }
        averages = None if self.average is None else clones(self.average._average_model.module)
        known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert {id(each) for each in known} == {id(each) for each in pl_module.parameters()}
        self.epochs.append((momenta, clones(pl_module), averages))

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Before(Watch):
    """The same at the end of each epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, *_):
        pass


def clones(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def fit(folder, *callbacks, method="merge", epochs=7, resume=None, every=2, **options):
    seed_everything(0)
    module = ImageClassifier("lenet_300_100", 10, (1, 8, 8), lr=0.1, schedule="one_cycle", decay_all=False)
    callback = NeuronMergeCallback(method, ratio=RATIOS, every_n_epochs=every, replace=True, **options)
    best = ModelCheckpoint(folder, "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
    every_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=CSVLogger(folder),
        callbacks=[*callbacks, callback, best, every_epoch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, build_data("digits", batch_size=64), ckpt_path=resume, weights_only=True)
    return trainer, module


def widths(state):
    return len(state["model.ip1.weight"]), len(state["model.ip2.weight"])


def survivors(old, new):
    """The rows of the first layer that stayed: no method changes their own weights."""
    return [int((old["model.ip1.weight"] == row).all(1).nonzero()[0]) for row in new["model.ip1.weight"]]


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_it_narrows_step_by_step_and_trains_on(method, tmp_path):
    before, after = Before(), Watch()
    trainer, module = fit(tmp_path, before, after, method=method)
    wanted = [(300, 100)] * 2 + [(240, 80)] * 2 + [(195, 65)] * 2 + [(150, 50)]
    assert [widths(weights) for _, weights, _ in after.epochs] == wanted, "ratios are of the original widths"
    for epoch in (2, 4, 6):
        (old_momenta, old, _), (momenta, new, _) = before.epochs[epoch - 1], after.epochs[epoch]
        assert old_momenta.keys() == momenta.keys(), "none is lost"
        rows = survivors(old, new)
        for name in ("model.ip1.weight", "model.ip1.bias"):
            assert torch.equal(momenta[name], old_momenta[name][rows])
        assert {name: value.shape for name, value in momenta.items()} == {name: new[name].shape for name in momenta}
        assert torch.equal(momenta["model.ip3.bias"], old_momenta["model.ip3.bias"])
    assert len(after.rates) == 7 * 20
    assert len(set(after.rates)) > 130, "the cycle goes on, step by step"

    final = ImageClassifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert widths(final.state_dict()) == (150, 50)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "best.ckpt")
    tested = trainer.test(module, build_data("digits"), ckpt_path="best", weights_only=True, verbose=False)
    assert tested[0]["test/accuracy"] > 0.93
    assert widths(torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]) == (300, 100)
    assert widths(torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"]) == (240, 80)
    last = torch.load(tmp_path / "epoch=6.ckpt", weights_only=True)
    loaded = nm_lightning.load(tmp_path / "epoch=6.ckpt", into=ImageClassifier("lenet_300_100", 10, (1, 8, 8)))
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in loaded.state_dict().items())


class RandomStates(Callback):
    """As train.py's runs have it."""

    def state_dict(self):
        return {"cpu": torch.get_rng_state()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["cpu"])


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_resumed_it_ends_with_the_same_weights(epoch, averaged, tmp_path):
    """From before the first step, between two, and before the last."""
    states = []
    for folder, resume in (("whole", None), ("parts", tmp_path / "whole" / f"epoch={epoch}.ckpt")):
        averages = [EMAWeightAveraging(decay=0.9)] if averaged else []
        _, module = fit(tmp_path / folder, *averages, RandomStates(), resume=resume)
        states.append(clones(module))
    assert widths(states[0]) == (150, 50)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("method", ["prune", "merge", "reconstruct"])
def test_an_average_is_sliced_and_moved_with_the_weights(method, tmp_path):
    average = EMAWeightAveraging(decay=0.9)
    before, after = Before(average), Watch(average)
    fit(tmp_path, average, before, after, method=method, every=1, epochs=5, calibration_size=200)
    for epoch in (1, 2, 3):
        (_, old, old_average), (_, new, new_average) = before.epochs[epoch - 1], after.epochs[epoch]
        rows = survivors(old, new)
        assert torch.equal(new_average["model.ip1.weight"], old_average["model.ip1.weight"][rows])
        lag_before = old["model.ip3.bias"] - old_average["model.ip3.bias"]
        lag_after = new["model.ip3.bias"] - new_average["model.ip3.bias"]
        assert lag_before.norm() > 0
        torch.testing.assert_close(lag_after, lag_before, rtol=0, atol=1e-6)
        moved = (old["model.ip3.bias"] != new["model.ip3.bias"]).any()
        assert moved == (method == "reconstruct")
    final = ImageClassifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    data = build_data("digits")
    data.setup("test")
    assert evaluate(final, data.test_dataloader(), data) > 0.9


def test_state_of_every_kind_of_optimiser():
    """Moments are sliced, steps stay; a bias that compression made joins the vectors; odd state begins anew."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False), nn.LayerNorm(3))
    matrices = [own for own in network.parameters() if own.ndim > 1]
    groups = [{"params": matrices}, {"params": list(network[3].parameters()), "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    network(torch.randn(5, 6)).pow(4).sum().backward()
    optimizer.step()
    moments = optimizer.state[network[0].weight]["exp_avg"].clone()
    optimizer.state[network[2].weight]["factor"] = torch.ones(8)
    before = dict(network.named_parameters())
    keep = [1, 4, 6]
    plan = {"slices": {"0.weight": [[0, 1, keep]], "2.weight": [[1, 1, keep]]}, "biases": {"2": 3}}
    apply_plan(network, plan)
    with pytest.warns(UserWarning, match="AdamW begins anew for 2.weight"):
        narrow_optimizer(optimizer, before, dict(network.named_parameters()), plan)
    state = optimizer.state[network[0].weight]
    assert torch.equal(state["exp_avg"], moments[keep])
    assert float(state["step"]) == 1
    assert network[2].weight not in optimizer.state
    assert [id(own) for own in optimizer.param_groups[1]["params"]] == [
        id(own) for own in (network[2].bias, network[3].weight, network[3].bias)
    ]
    network(torch.randn(5, 6)).pow(4).sum().backward()
    optimizer.step()
    assert optimizer.state[network[0].weight]["exp_avg"].shape == (3, 6)


def test_early_stopping_compares_narrow_with_narrow(tmp_path):
    """Each step begins a new comparison."""
    stop = EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=0.5)  # one epoch may be worse, not two
    trainer, _ = fit(tmp_path, stop, every=1, epochs=9)
    assert trainer.current_epoch == 5, "the last step is before the fourth epoch, which is the best; the fifth is not"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": RATIOS}, "give every_n_epochs with several ratios"),
        ({"ratio": 0.5, "every_n_epochs": 2}, "every_n_epochs goes with several ratios"),
        ({"ratio": [0.5, 0.2], "every_n_epochs": 2}, "give ascending ratios"),
        ({"ratio": [0.5, 1.2], "every_n_epochs": 2}, "ratio 1.2"),
        ({"ratio": RATIOS, "every_n_epochs": 0}, "every_n_epochs 0: give a whole number of epochs from 1"),
        ({"ratio": RATIOS, "every_n_epochs": 2, "replace": False}, "give replace=True"),
        ({"ratio": RATIOS, "every_n_epochs": 2, "target_macs": 0.5}, "give no widths or target"),
    ],
)
def test_bad_schedules_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        NeuronMergeCallback(**{"replace": True, **settings})


def test_a_training_that_ends_too_early_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_epochs 6: the last ratio is reached after 6: give more"):
        fit(tmp_path, epochs=6)


def test_a_schedule_needs_a_look_at_the_network_first(tmp_path, monkeypatch):
    monkeypatch.setattr("nm_lightning.loaders.Loaders.first", lambda *_: None)
    with pytest.raises(InputError, match="no batch can be looked at before training: set example_input_array"):
        fit(tmp_path)


RANKS = """
import hashlib, json
from pathlib import Path
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from callbacks import NeuronMergeCallback
from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier

def digest(tensors):
    whole = hashlib.sha256()
    for value in tensors:
        whole.update(value.detach().numpy().tobytes())
    return whole.hexdigest()

seed_everything(0)
module = ImageClassifier("lenet_300_100", 10, (1, 8, 8), lr=0.05)
callback = NeuronMergeCallback("reconstruct", ratio=[0.2, 0.5], every_n_epochs=1, replace=True, calibration_size=100)
best = ModelCheckpoint("trained", "best", monitor="val/accuracy", mode="max", enable_version_counter=False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False, enable_progress_bar=False,
                  enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=0.9), callback, best])
trainer.fit(module, build_data("digits", batch_size=32))
states = [value["momentum_buffer"] for value in trainer.optimizers[0].state.values()]
found = {"module": digest(module.state_dict().values()), "momenta": digest(states)}
found["width"] = module.model.ip1.out_features
Path(f"{trainer.global_rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.xdist_group("ranks")
def test_two_ranks_stay_one_network(tmp_path):
    (tmp_path / "training.py").write_text(RANKS)
    arguments = [sys.executable, "training.py"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "gradients are averaged over both, before and after each step"
    assert first["width"] == 150
    final = ImageClassifier.load_from_checkpoint(tmp_path / "trained" / "best.ckpt", weights_only=True)
    assert final.model.ip1.out_features == 150
    data = build_data("digits")
    data.setup("test")
    assert evaluate(final, data.test_dataloader(), data) > 0.85
