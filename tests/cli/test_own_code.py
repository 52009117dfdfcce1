"""Code of the user's own on the command line: networks of every kind, their data, and one line for each bad input."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything

import nm_lightning
from nm_lightning.cli import compress, train
from nm_lightning.errors import InputError
from nm_lightning.models import registry
from nm_lightning.modules import ImageClassifier

NET, DATA = "their_package.nets:Net", "their_package.data:Blobs"
OWN = ["--model", NET, "--data", DATA]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SHORT = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A stranger's folder with checkpoints: of a LightningModule, of one that holds an object, and a bare one."""
    place = tmp_path_factory.mktemp("stranger") / "folder"
    shutil.copytree(Path(__file__).parent / "stranger", place)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        from their_package.data import Blobs
        from their_package.nets import Active, Net

        seed_everything(0)
        for name, module in {"mine": Net(48), "active": Active(48, torch.nn.LeakyReLU(0.2))}.items():
            trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
            trainer.fit(module, Blobs())
            trainer.save_checkpoint(place / f"{name}.ckpt")
        torch.save(module.net.state_dict(), place / "bare.pt")
        yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[name]


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(registry, "ARCHITECTURES", list(registry.ARCHITECTURES))
    return place


def run(output, *flags):
    compress.main(["--device", "cpu", "--ratio", "0.5", "--output", str(output), "--quiet", *flags])
    report = json.loads((output / "report.json").read_text())
    return report, output / report["results"][0]["checkpoint"]


def accuracy(network):
    from their_package.data import Blobs

    (batch,) = Blobs(batch_size=500).val_dataloader()
    with torch.no_grad():
        return float((network.eval()(batch["image"]).argmax(1) == batch["label"]).float().mean())


def test_a_module_is_measured_compressed_and_loads_again(here, tmp_path):
    from their_package.nets import Net

    report, checkpoint = run(tmp_path / "out", "--checkpoint", "mine.ckpt", *OWN, "--method", "reconstruct")
    assert report["title"] == f"{NET} on {DATA}"
    assert report["baseline"]["accuracy"] == pytest.approx(accuracy(Net.load_from_checkpoint("mine.ckpt")))
    small = nm_lightning.load(checkpoint, into=Net(48))
    assert small.net.body[1].out_features == 24
    assert report["results"][0]["accuracy"] == pytest.approx(accuracy(small))
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"] == {"width": 48, "rate": 0.05}

    report, again = run(tmp_path / "again", "--checkpoint", str(checkpoint), *OWN)
    assert report["baseline"]["accuracy"] == pytest.approx(accuracy(small))
    assert nm_lightning.load(again, into=Net(48)).net.body[1].out_features == 12


@pytest.mark.parametrize("name", ["Plain", "build"])
@pytest.mark.parametrize("file", ["bare.pt", "mine.ckpt"])
def test_a_plain_network_and_a_function(name, file, here, tmp_path):
    from their_package.nets import Plain

    names = ["--model", f"their_package.nets:{name}", "--model.width", "48", "--data", DATA]
    act = ["--model.act", "torch.nn:ReLU()"] if name == "Plain" else []
    report, checkpoint = run(tmp_path / "out", "--checkpoint", file, *names, *act)
    assert report["results"][0]["accuracy"] == pytest.approx(accuracy(nm_lightning.load(checkpoint, into=Plain(48))))


def test_what_is_built_without_a_checkpoint_is_taken_as_it_is(here, tmp_path):
    report, _ = run(tmp_path / "out", "--model", "their_package.nets:build", "--data", "digits")
    assert report["origin"] == "what their_package.nets:build builds"
    assert report["results"][0]["widths"] == {"body.1": 24}


def test_an_object_among_the_hyper_parameters_is_named_and_can_be_given(here, tmp_path, capsys):
    model = ["--checkpoint", "active.ckpt", "--model", "their_package.nets:Active", "--data", DATA]
    assert "give --model.act VALUE" in one_line(capsys, compress, *model)
    _, checkpoint = run(tmp_path / "out", *model, "--model.act", "torch.nn:LeakyReLU()")
    assert "act is an object" in one_line(capsys, compress, "--checkpoint", str(checkpoint), *model[2:])


def test_the_modules_own_loaders(here, tmp_path):
    report, _ = run(tmp_path / "out", "--checkpoint", "mine.ckpt", "--model", "their_package.nets:Fed")
    assert report["baseline"]["accuracy"] > 0.5
    train.main(["--model", "their_package.nets:Fed", "--model.width", "8", "--trainer.limit_val_batches", "0", *SHORT])
    assert Path("runs/Fed/best.ckpt").is_file()


def test_a_training_run_is_found_by_its_modules_name(here, tmp_path):
    train.main([*OWN, "--model.width", "16", "--data.batch_size", "50", *SHORT])
    content = torch.load("runs/Net_Blobs/best.ckpt", weights_only=True)
    assert content["global_step"] == 20
    report, _ = run(tmp_path / "out", *OWN)
    assert report["origin"] == "runs/Net_Blobs/best.ckpt"
    assert report["results"][0]["widths"] == {"net.body.1": 8}

    last = "runs/Net_Blobs/last.ckpt"
    train.main(["--config", "runs/Net_Blobs/config.yaml", "--trainer.max_epochs", "2", "--ckpt_path", last])
    assert torch.load(last, weights_only=True)["global_step"] == 40


def test_a_plain_network_in_our_classifier_with_the_users_data(here, tmp_path, capsys):
    names = ["--model", "their_package.nets:Plain", "--data", "their_package.data:Counted"]
    train.main([*names, "--model.width", "16", "--model.lr", "0.05", *SHORT])
    checkpoint = "runs/nets_Plain_Counted/best.ckpt"
    assert ImageClassifier.load_from_checkpoint(checkpoint).hparams.arguments == {"width": 16}
    train.main(["--config", "runs/nets_Plain_Counted/config.yaml", "--experiment", "again", *SHORT])
    again, first = (torch.load(f"runs/{name}/best.ckpt")["state_dict"] for name in ("again", "nets_Plain_Counted"))
    assert all(torch.equal(again[key], value) for key, value in first.items())
    _, small = run(tmp_path / "out", "--checkpoint", checkpoint, *names)
    assert ImageClassifier.load_from_checkpoint(small).model.body[1].out_features == 8
    registry.ARCHITECTURES.pop()
    with pytest.raises(InputError, match="register_own"):
        ImageClassifier.load_from_checkpoint(small)  # a file's word is not enough to import code
    assert "give --model their_package.nets:Plain" in one_line(capsys, compress, "--checkpoint", str(small), *names[2:])


def test_a_name_of_a_library_that_is_not_there(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in one_line(capsys, compress, "--model", "timm/resnet18", "--data", DATA)
    assert "no folder with a config.json" in one_line(capsys, compress, "--model", "hf/nowhere", "--data", DATA)


def one_line(capsys, script, *flags):
    """The error that a script ends in."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main(list(flags))
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sorted(path for path in Path().rglob("*") if path.suffix != ".pyc") == [
        path for path in before if path.suffix != ".pyc"
    ]
    return errors[0]


MINE = ["--checkpoint", "mine.ckpt"]


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (compress, [*MINE, "--model", "their_pakage.nets:Net", "--data", DATA], "no module their_pakage in"),
        (
            compress,
            [*MINE, "--model", "their_package.nets:Nit", "--data", DATA],
            "no Nit: it has Plain, build, Net",
        ),
        (compress, [*MINE, "--model", "their_package.nets:nn", "--data", DATA], "is a module: name a class"),
        (compress, [*MINE, "--model", "math:sqrt", "--data", DATA], "math:sqrt"),
        (compress, [*MINE, *OWN, "--model.widht", "3"], "--model.widht: their_package.nets:Net takes width, rate"),
        (compress, [*MINE, *OWN, "--model.width", "3"], "net.body.1.weight is (48, 64) there, (3, 64) here"),
        (compress, [*MINE, *OWN, "--model.width", "many"], "can't be built with width 'many'"),
        (compress, [*MINE, "--model", NET], "give --data NAME"),
        (compress, [*MINE, "--data", DATA], "give --model NAME, or module:Class"),
        (compress, [*MINE, "--model", NET, "--data", NET, "--data.width", "3"], "not a LightningDataModule"),
        (compress, [*MINE, "--model", NET, "--data", "their_package.data:Broken"], "no images in /nowhere"),
        (compress, [*MINE, "--model", NET, "--data", "digits", "--data.size", "3"], "--data.size: digits takes name"),
        (compress, [*MINE, *OWN, "--data.noise", "loud"], "can't read a batch"),
        (compress, [*MINE, *OWN, "--input_key", "picture"], "hold no tensor of inputs"),
        (compress, [*MINE, *OWN, "--calibration", "photos", "--method", "reconstruct"], "calibration 'photos'"),
        (compress, ["--checkpoint", "bare.pt", "--model", "their_package.nets:Plain", "--data", DATA], "needs width"),
        (compress, ["--model", "their_package.nets:Active", "--data", DATA], "no training run of"),
        (train, ["--model", "their_package.nets:Active", "--data", DATA, "--model.act", "x"], "needs width"),
        (train, OWN, "needs width: give --model.width VALUE"),
        (train, [*OWN, "--model.width", "many"], "their_package.nets.Net can't be built"),
        (train, [*OWN, "--model.width", "3", "--model.widht", "3"], "widht"),
        (train, [*OWN, "--model.width", "3", "--model.rate", "fast"], "rate"),
        (train, ["--model", NET, "--model.width", "3"], "no data of its own: give --data NAME"),
        (train, ["--model", "their_package.nets:Nit", "--data", DATA], "has no Nit"),
        (train, ["--model", NET, "--model.width", "3", "--data", NET], "is no LightningDataModule"),
        (train, ["--model", "their_package.nets:Plain", "--data", "digits"], "needs width"),
        (train, ["--model", "lenet_300_100", "--data", DATA], "does not say how many classes"),
    ],
)
def test_bad_input_is_one_line(script, flags, says, here, capsys):
    assert says in one_line(capsys, script, *flags, *(SHORT if script is train else []))
