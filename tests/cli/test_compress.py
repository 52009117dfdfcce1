"""compress.py: what it writes, what it picks by itself, and one line for each bad input."""

import csv
import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image

from nm_lightning.cli import compress, grid
from nm_lightning.compression.files.quantize import OnnxFile
from nm_lightning.data import build_data
from nm_lightning.models import build_model
from nm_lightning.modules import ImageClassifier, evaluate
from tests import ROOT
from tests.datasets import write_images

BEST = "runs/lenet_300_100_digits/best.ckpt"


@pytest.fixture
def workplace(training_run, monkeypatch):
    monkeypatch.chdir(training_run)
    return training_run


def report(folder):
    return json.loads((Path(folder) / "report.json").read_text())


def test_report_table_plot_and_loadable_checkpoints(workplace, tmp_path, capsys):
    flags = ["--method", "prune", "merge", "--criterion", "l1-norm", "l2-GM", "--ratio", "0.25", "0.5"]
    compress.main([*flags, "--output", str(tmp_path / "out")])
    content = report(tmp_path / "out")
    assert set(content["baseline"]) == {"accuracy", "parameters", "macs", "latency", "logged"}
    assert content["baseline"]["parameters"] == sum(
        p.numel() for p in build_model("lenet_300_100", 10, (1, 8, 8)).parameters()
    )
    assert content["baseline"]["macs"] == 64 * 300 + 300 * 100 + 100 * 10
    assert len(content["results"]) == 8
    data = build_data("digits")
    data.setup("test")
    for row in content["results"]:
        keys = {"method", "criterion", "ratio", "accuracy", "parameters", "macs", "seconds", "widths", "notes"}
        assert keys <= set(row)
        assert row["widths"] == {"ip1": 300 * (1 - row["ratio"]), "ip2": 100 * (1 - row["ratio"])}
        module = ImageClassifier.load_from_checkpoint(tmp_path / "out" / row["checkpoint"], weights_only=True)
        assert module.model.ip1.out_features == row["widths"]["ip1"]
        assert sum(p.numel() for p in module.model.parameters()) == row["parameters"]
        assert evaluate(module, data.test_dataloader(), data) == row["accuracy"]

    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in content["results"]]
    assert Image.open(tmp_path / "out" / "accuracy.png").width > 500
    printed = capsys.readouterr().out
    for row in content["results"]:
        assert f"{100 * row['accuracy']:.2f}" in printed


def test_the_newest_training_run_is_the_default(workplace, capsys):
    compress.main([])
    outputs = [path for path in (workplace / "runs").iterdir() if path.name.startswith("compress-")]
    assert len(outputs) == 1
    assert report(outputs[0])["origin"] == "runs/lenet_300_100_digits/best.ckpt"
    (outputs[0] / "report.json").unlink()
    compress.main(["--output", str(outputs[0])])  # now the newest checkpoints are compress.py's own
    assert report(outputs[0])["origin"] == "runs/lenet_300_100_digits/best.ckpt"


def test_ratio_zero_keeps_every_prediction(workplace, tmp_path):
    compress.main(["--ratio", "0", "--output", str(tmp_path / "out")])
    content = report(tmp_path / "out")
    row = content["results"][0]
    assert {key: row[key] for key in content["baseline"]} == content["baseline"]


def test_widths_by_order_and_by_name(workplace, tmp_path):
    compress.main(["--widths", "30", "20", "--output", str(tmp_path / "order")])
    assert report(tmp_path / "order")["results"][0]["widths"] == {"ip1": 30, "ip2": 20}
    compress.main(["--widths", "ip2=20", "--output", str(tmp_path / "name")])
    assert report(tmp_path / "name")["results"][0]["widths"] == {"ip1": 300, "ip2": 20}
    compress.main(["--sites", "ip1", "--ratio", "0.5", "--output", str(tmp_path / "sites")])
    assert report(tmp_path / "sites")["results"][0]["widths"] == {"ip1": 150}


def test_exports_predict_the_same(workplace, tmp_path):
    compress.main(["--ratio", "0.5", "--export", "pt2", "onnx", "--output", str(tmp_path / "out")])
    row = report(tmp_path / "out")["results"][0]
    stem = row["checkpoint"].removesuffix(".ckpt")
    data = build_data("digits")
    data.setup("test")
    program = torch.export.load(tmp_path / "out" / f"{stem}.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "out" / f"{stem}.onnx")
    label = session.get_inputs()[0].name
    for network in (program, lambda images: torch.from_numpy(session.run(None, {label: images.numpy()})[0])):
        right = total = 0
        for batch in data.test_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            right, total = right + int((network(images).argmax(1) == labels).sum()), total + len(labels)
        assert right / total == row["accuracy"]


def test_eight_bits_are_smaller_and_measured(workplace, tmp_path):
    compress.main(["--ratio", "0.5", "--quantize", "int8", "--output", str(tmp_path / "out")])
    row = report(tmp_path / "out")["results"][0]
    wide, small = row["exported"]
    assert wide["accuracy"] == row["accuracy"]
    assert small["bytes"] < 0.4 * wide["bytes"]
    assert small["accuracy"] > row["accuracy"] - 0.02
    data, network = build_data("digits"), OnnxFile(tmp_path / "out" / small["file"])
    data.setup("test")
    assert evaluate(network, data.test_dataloader(), data) == small["accuracy"]
    for page in ("report.html", "report.md"):
        assert small["file"] in (tmp_path / "out" / page).read_text()


@pytest.mark.parametrize("calibration", ["data", "synthetic", "photos"])
def test_calibration_images_from_everywhere(calibration, workplace, tmp_path):
    write_images(tmp_path / "photos", 2, 8, 16)
    source = str(tmp_path / "photos") if calibration == "photos" else calibration
    flags = ["--method", "prune", "reconstruct", "--ratio", "0.6", "--calibration", source, "--calibration_size", "200"]
    compress.main([*flags, "--recalibrate_norm", "--finetune", "2", "--output", str(tmp_path / "out")])
    content = report(tmp_path / "out")
    assert content["calibration"] == source
    assert content["calibration_size"] == (16 if calibration == "photos" else 200)
    pruned, solved = content["results"]
    if calibration == "data":
        assert solved["accuracy"] > pruned["accuracy"]
    module = ImageClassifier.load_from_checkpoint(tmp_path / "out" / solved["checkpoint"], weights_only=True)
    data = build_data("digits")
    data.setup("test")
    assert evaluate(module, data.test_dataloader(), data) == solved["accuracy"]


def test_a_target_instead_of_a_ratio(workplace, tmp_path):
    flags = ["--method", "merge", "reconstruct", "--criterion", "output", "--target_macs", "0.4"]
    compress.main([*flags, "--output", str(tmp_path / "out")])
    content = report(tmp_path / "out")
    for row in content["results"]:
        assert row["recipe"]["budget"] == {"name": "macs", "share": 0.4, "round_to": 1}
        assert 0.35 < row["macs"] / content["baseline"]["macs"] <= 0.4
        assert row["checkpoint"] == f"{row['method']}_output_macs0.4.ckpt"


def test_an_output_folder_holds_what_its_report_tells(workplace, tmp_path):
    compress.main(["--ratio", "0.5", "0.6", "--output", str(tmp_path / "out")])
    compress.main(["--ratio", "0.7", "--output", str(tmp_path / "out")])
    told = {row["checkpoint"] for row in report(tmp_path / "out")["results"]}
    assert {file.name for file in (tmp_path / "out").glob("*.ckpt")} == told


def test_implementations_agree(workplace, tmp_path):
    rows = []
    for implementation in ("fast", "reference"):
        output = tmp_path / implementation
        compress.main(["--ratio", "0.6", "--implementation", implementation, "--output", str(output)])
        rows.append(report(output)["results"][0]["accuracy"])
    assert rows[0] == rows[1]


def test_compressed_checkpoints_compress_again(workplace, tmp_path):
    compress.main(["--ratio", "0.5", "--output", str(tmp_path / "first")])
    checkpoint = tmp_path / "first" / report(tmp_path / "first")["results"][0]["checkpoint"]
    compress.main(["--checkpoint", str(checkpoint), "--ratio", "0.5", "--output", str(tmp_path / "second")])
    row = report(tmp_path / "second")["results"][0]
    assert row["widths"] == {"ip1": 75, "ip2": 25}
    module = ImageClassifier.load_from_checkpoint(tmp_path / "second" / row["checkpoint"], weights_only=True)
    assert module.model.ip2.in_features == 75


def test_every_form_of_checkpoint_loads(workplace, tmp_path):
    state, one = torch.load("runs/lenet_300_100_digits/best.ckpt", weights_only=True)["state_dict"], torch.tensor(1)
    bare = {key.removeprefix("model."): value for key, value in state.items()}
    forms = {
        "bare": bare,
        "wrapped": {"acc": 1.0, "state_dict": bare},
        "compiled": {"model": {f"_orig_mod.{key}": value for key, value in bare.items()}, "args": Code()},
        "averaged": {
            "state_dict": {key: torch.zeros_like(value) for key, value in bare.items()},
            "state_dict_ema": {f"module._orig_mod.{key}": value for key, value in bare.items()} | {"n_averaged": one},
        },
        "lightning": {"state_dict": {f"model._orig_mod.{key}": value for key, value in bare.items()}},
        "parallel": {"state_dict": {f"module.{key}": value for key, value in bare.items()}},
        "half": {key: value.half() for key, value in bare.items()},
    }
    accuracies = {}
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.pth")
        flags = ["--checkpoint", str(tmp_path / f"{name}.pth"), "--model", "lenet_300_100", "--data", "digits"]
        compress.main([*flags, "--output", str(tmp_path / name)])
        accuracies[name] = report(tmp_path / name)["baseline"]["accuracy"]
    assert len({accuracies[name] for name in forms if name != "half"}) == 1
    assert abs(accuracies["half"] - accuracies["bare"]) < 0.01


def test_a_checkpoint_saved_on_a_gpu_loads(published, fashion_mnist, tmp_path):
    path = published("lenet_300_100")
    assert b"cuda" in path.read_bytes()
    flags = ["--checkpoint", str(path), "--model", "lenet_300_100", "--data", "fashion_mnist", "--device", "cpu"]
    compress.main([*flags, "--output", str(tmp_path / "out")])
    assert report(tmp_path / "out")["baseline"]["accuracy"] > 0.89


def test_imagenet_for_real(real_data, tmp_path):
    """Random weights on real images: every step of the road, and ImageNet's 1,000 classes."""
    flags = ["--model", "torchvision/squeezenet1_1", "--data", "imagenet"]
    flags += ["--data_dir", str(real_data / "imagenet_sample"), "--method", "prune", "merge"]
    compress.main([*flags, "--output", str(tmp_path / "out")])
    content = report(tmp_path / "out")
    assert content["origin"] == "random weights"
    for row in content["results"]:
        assert row["parameters"] < content["baseline"]["parameters"]
        assert 0 <= row["accuracy"] < 0.02
        module = ImageClassifier.load_from_checkpoint(tmp_path / "out" / row["checkpoint"], weights_only=True)
        assert module.hparams.num_classes == 1000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "melt"], "unknown method 'melt'"),
        (["--criterion", "l3-norm"], "unknown criterion 'l3-norm'"),
        (["--scope", "some"], "unknown scope 'some'"),
        (["--export", "pdf"], "unknown export 'pdf'"),
        (["--quantize", "int1"], "unknown quantize 'int1'"),
        (["--formulation", "mine"], "unknown formulation 'mine'"),
        (["--implementation", "mine"], "unknown implementation 'mine'"),
        (["--ratio", "1"], "ratio 1.0"),
        (["--ratio", "0.5", "-0.1"], "ratio -0.1"),
        (["--ratio", "nan"], "ratio nan"),
        (["--ratio", "half"], "'half'"),
        (["--threshold", "2"], "threshold 2.0"),
        (["--lamda", "-1"], "lamda -1.0"),
        (["--widths", "30"], "1 widths for 2 sites"),
        (["--widths", "30", "101"], "width 101 for ip2"),
        (["--widths", "0", "20"], "width 0 for ip1"),
        (["--widths", "ip9=20"], "'ip9'"),
        (["--widths", "ip1=20", "30"], "not both"),
        (["--widths", "many", "20"], "--widths many 20: give whole numbers"),
        (["--sites", "conv*"], "'conv*' matches none"),
        (["--reconstruction", "row"], "unknown reconstruction 'row'"),
        (["--method", "reconstruct", "--ridge", "-1"], "ridge -1.0"),
        (["--method", "reconstruct", "--ridge", "nan"], "ridge nan"),
        (["--method", "reconstruct", "--calibration", "nowhere"], "calibration 'nowhere' is no folder"),
        (["--method", "reconstruct", "--calibration", "runs"], "calibration folder 'runs' has no images"),
        (["--method", "reconstruct", "--calibration_size", "0"], "calibration_size 0"),
        (["--finetune", "-1"], "finetune -1"),
        (["--round_to", "0"], "round_to 0"),
        (["--target_macs", "2"], "target_macs 2.0"),
        (["--target_macs", "0.5", "--ratio", "0.5"], "not both"),
        (["--target_parameters", "0.001"], "can't bring the network below"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--seed", "today"], "'today'"),
        (["--melt"], "--melt"),
        (["--checkpoint", "missing.ckpt"], "'missing.ckpt' does not exist"),
        (["--checkpoint", "truncated.ckpt"], "'truncated.ckpt' is truncated"),
        (["--checkpoint", "text.ckpt"], "'text.ckpt' is truncated or not a PyTorch checkpoint"),
        (
            ["--checkpoint", "code.ckpt", "--model", "lenet_300_100", "--data", "digits"],
            "'code.ckpt' holds whole objects, not weights",
        ),
        (["--checkpoint", "list.ckpt"], "'list.ckpt' holds a list"),
        (["--checkpoint", "bare.ckpt"], "--model NAME"),
        (["--checkpoint", "bare.ckpt", "--model", "lenet_300_100"], "--data NAME"),
        (["--checkpoint", "bare.ckpt", "--model", "lenet_5", "--data", "digits"], "unknown model 'lenet_5'"),
        (["--checkpoint", "bare.ckpt", "--model", "lenet_300_100", "--data", "mnist"], "unknown data 'mnist'"),
        (
            ["--checkpoint", "other.ckpt", "--model", "lenet_300_100", "--data", "digits"],
            "ip1.weight is (300, 784)",
        ),
        (["--checkpoint", "bare.ckpt", "--model", "resnet20", "--data", "cifar10"], "no cifar10 in 'data'"),
        (["--model", "resnet20", "--data", "digits"], "no training run of resnet20 on digits"),
        (["--checkpoint", BEST, "--data", "fashion_mnist"], "trained for input_shape (1, 8, 8)"),
        (["--model", "lenet_300_100", "--weights", "DEFAULT"], "torchvision's"),
        (["--checkpoint", "runs"], "'runs' is a folder"),
        (["--output", "text.ckpt"], "output 'text.ckpt' can't be written"),
        (["--output", "text.ckpt/out"], "output 'text.ckpt/out' can't be written"),
    ],
)
def test_bad_input_is_one_line(arguments, says, trained, tmp_path, monkeypatch, no_network, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "lenet_300_100_digits"
    run.mkdir(parents=True)
    (run / "best.ckpt").write_bytes(trained.read_bytes())
    Path("truncated.ckpt").write_bytes(trained.read_bytes()[:5000])
    Path("text.ckpt").write_text("no checkpoint")
    state = torch.load(trained, weights_only=True)["state_dict"]
    torch.save({key.removeprefix("model."): value for key, value in state.items()}, "bare.ckpt")
    torch.save(build_model("lenet_300_100", 10, (1, 28, 28)).state_dict(), "other.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": Code()}, "code.ckpt")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    with pytest.raises(SystemExit) as exit_:
        compress.main(arguments)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert says in errors[0]
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {Path("data")}  # torchvision's empty folder
    assert sorted(left) == before
    assert not Path("written").exists(), "code in a checkpoint was run"


class Code:
    """Pickles to a call that leaves a file behind."""

    def __reduce__(self):
        return (open, ("written", "w"))


def test_no_run_at_all(in_tmp, capsys):
    with pytest.raises(SystemExit) as exit_:
        compress.main([])
    assert exit_.value.code == 2
    assert "run train.py first" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_killed_halfway_leaves_no_result(workplace, tmp_path, number):
    """The slow loops give time to kill the run between its first checkpoint and its report."""
    output = tmp_path / "out"
    flags = [
        "--implementation",
        "reference",
        "--ratio",
        "0.5",
        "0.6",
        "0.7",
        "0.8",
        "--criterion",
        "l1-norm",
        "l2-norm",
    ]
    process = subprocess.Popen([sys.executable, str(ROOT / "compress.py"), *flags, "--output", str(output)])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*/*.ckpt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) != 0
    assert not output.exists()
    if number == signal.SIGKILL:
        (left,) = tmp_path.iterdir()
        compress.main(["--ratio", "0.5", "--output", str(tmp_path / "another"), "--quiet"])
        assert not left.exists(), "the next run sweeps"
        assert (tmp_path / "another" / "report.json").is_file()
    else:
        assert not list(tmp_path.iterdir())


def one_line(output, capsys, *flags):
    """What compress.py says of an output that it can't have."""
    with pytest.raises(SystemExit) as exit_:
        compress.main(["--ratio", "0.5", "--output", str(output), "--quiet", *flags])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_two_runs_into_one_folder(workplace, tmp_path, capsys):
    with grid.appearing(tmp_path / "out") as held:
        assert "out' is being written by another run" in one_line(tmp_path / "out", capsys)
        compress.main(["--ratio", "0.5", "--output", str(tmp_path / "out.2"), "--quiet"])  # another folder
        (held / "report.json").write_text("{}")
    assert (tmp_path / "out" / "report.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.2"]


@pytest.mark.parametrize("what", ["full", "vanished", "changed"])
def test_what_goes_wrong_under_way_is_one_line_and_the_last_result_stays(
    what, workplace, tmp_path, monkeypatch, capsys
):
    compress.main(["--ratio", "0.5", "--output", str(tmp_path / "out"), "--quiet"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()

    def fails(*arguments):
        if what == "vanished":
            shutil.rmtree(next(tmp_path.glob(".out.*")))
            return written(*arguments)
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise FileNotFoundError(2, "No such file or directory", "data/dog/1.png")

    written = grid._save_checkpoint
    if what == "changed":
        monkeypatch.setattr("nm_lightning.measure.dealt", lambda loader, ranks: map(fails, loader))
    else:
        monkeypatch.setattr(grid, {"full": "write_files", "vanished": "_save_checkpoint"}[what], fails)
    says = {"full": "No space left on device", "vanished": "can't be written", "changed": "has it changed?"}[what]
    assert says in one_line(tmp_path / "out", capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finetuning_on_all_training_images(workplace, tmp_path):
    """Without labels, and better than on a few; the recipe says which."""
    flags = ["--method", "prune", "--ratio", "0.8", "--finetune", "3"]
    accuracy = []
    for place in ("calibration", "training"):
        compress.main([*flags, "--finetune_on", place, "--calibration_size", "64", "--output", str(tmp_path / place)])
        found = report(tmp_path / place)
        assert found["results"][0]["recipe"]["then"] == [{"name": "finetune", "epochs": 3, "images": place}]
        assert ("calibration" in found) == (place == "calibration")
        accuracy.append(found["results"][0]["accuracy"])
    assert accuracy[1] > accuracy[0]
