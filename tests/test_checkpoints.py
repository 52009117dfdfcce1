"""The repository's own checkpoints: found by name, loaded without pickle, as accurate as recorded."""

import pytest
import torch
import yaml

import compress
from nm_lightning.cli import sources
from nm_lightning.cli.sources import CHECKPOINTS, Asked, located, open_source
from nm_lightning.errors import InputError
from nm_lightning.measure import evaluate
from nm_lightning.modules import ImageClassifier
from tests import ROOT

INDEX = yaml.safe_load((CHECKPOINTS / "index.yaml").read_text())


@pytest.mark.parametrize("name", INDEX)
def test_by_name_it_is_as_accurate_as_recorded(name, real_data, request):
    if name.endswith("fashion_mnist"):
        request.getfixturevalue("fashion_mnist")
    elif not (real_data / name.rpartition("_")[2] / "test").is_dir():
        pytest.skip("real images are not unpacked: see .ci/run")
    source = open_source(Asked(name, data_dir=str(real_data)))
    assert {value.dtype for value in source.network.state_dict().values()} <= {torch.float32, torch.int64}
    data = source.loaders.data
    images, labels = data.normalise(data.splits["test"].images[::20]), data.splits["test"].labels[::20]
    accuracy = evaluate(source.network, list(zip(images.split(100), labels.split(100), strict=True)))
    assert abs(round(500 * accuracy) - INDEX[name]["every_20th"]) <= 1
    assert abs(accuracy - INDEX[name]["accuracy"]) < 0.05


@pytest.mark.parametrize("name", INDEX)
def test_its_config_and_log_lie_beside_it(name):
    config = yaml.safe_load((CHECKPOINTS / f"{name}.yaml").read_text())
    module = ImageClassifier.load_from_checkpoint(CHECKPOINTS / f"{name}.ckpt", weights_only=True)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    hparams = {key: list(value) if isinstance(value, tuple) else value for key, value in module.hparams.items()}
    assert {key: hparams[key] for key in config["model"] if key in hparams} == {
        key: value for key, value in config["model"].items() if key in hparams
    }
    words = INDEX[name]["command"].split()[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    fast = yaml.safe_load((ROOT / given.pop("--config")).read_text())
    for flag, value in given.items():
        part, key = flag.removeprefix("--").split(".")
        fast[part][key] = yaml.safe_load(value)
    for part in ("model", "data", "trainer"):  # whoever gives the command today trains as it was trained
        assert {key: config[part][key] for key in fast[part]} == fast[part]
    assert (CHECKPOINTS / f"{name}.csv").read_text().startswith("epoch,")


def test_what_is_not_as_recorded_is_one_line(in_tmp, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        compress.main(["--checkpoint", "vgg19_cifar100"])
    assert exit_.value.code == 2
    names = ", ".join(INDEX)
    wanted = f"error: checkpoint 'vgg19_cifar100' does not exist: give a file, or one of {names}\n"
    assert capsys.readouterr().err == wanted
    (in_tmp / "index.yaml").write_text((CHECKPOINTS / "index.yaml").read_text())
    (in_tmp / "resnet20_cifar10.ckpt").write_text("version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(sources, "CHECKPOINTS", in_tmp)
    for name in ("resnet20_cifar10", "vgg16_cifar100"):
        with pytest.raises(InputError, match=f"{name}.ckpt' is missing or not as recorded"):
            located(name)


def test_a_file_goes_before_a_name(in_tmp):
    torch.save({}, "resnet20_cifar10")
    assert str(located("resnet20_cifar10")) == "resnet20_cifar10"
    assert located("runs/vgg16_cifar100") == sources.Path("runs/vgg16_cifar100")
