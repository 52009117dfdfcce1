"""A stranger's folder, and a wheel in a fresh environment: their training, `nm-compress`, their fine-tuning."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import ROOT

HERE = Path(__file__).parent
IN_A_WHEEL = ("nm_lightning", "configs", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


def shell(*words, cwd):
    """What a command printed, in an environment from which the checkout can't be imported."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WANDB_SERVICE")}
    quiet = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=inherited | quiet, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The `bin` of a fresh environment with our wheel; what it needs is borrowed from the tests' own environment."""
    place = tmp_path_factory.mktemp("wheel")
    for name in IN_A_WHEEL:  # a build leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    venv.create(place / "env", symlinks=True)
    python = place / "env" / "bin" / "python"
    (packages,) = (place / "env" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
        build = [*pip, "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", "."]
        install = [*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
    else:
        build = ["uv", "build", "-q", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", "dist"]
        install = ["uv", "pip", "install", "-q", "--python", python, "--no-deps", "--no-index", "--reinstall"]
    shell(*build, cwd=place)
    (wheel,) = (place / "dist").glob("*.whl")
    shell(*install, wheel, cwd=place)
    return python.parent


def test_a_strangers_folder(fresh, tmp_path):
    folder = shutil.copytree(HERE / "stranger", tmp_path / "folder")
    names = ["--model", "their_package.nets:Net", "--data", "their_package.data:Blobs"]
    flags = ["--model.width", "24", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    with ThreadPoolExecutor() as both:
        ours = both.submit(shell, fresh / "nm-train", *names, *flags, "--trainer.accelerator", "cpu", cwd=folder)
        both.submit(shell, fresh / "python", "fit.py", cwd=folder).result()
    assert "runs/Net_Blobs/best.ckpt" in ours.result()
    state = torch.load(folder / "runs" / "Net_Blobs" / "best.ckpt", weights_only=True)["state_dict"]
    assert state["net.body.1.weight"].shape == (24, 64)

    flags = ["--method", "reconstruct", "--ratio", "0.75", "--output", "small", "--json"]
    said = shell(fresh / "nm-compress", "--checkpoint", "checkpoints/mine.ckpt", *names, *flags, cwd=folder)
    report = json.loads(said)
    (row,) = report["results"]
    assert report["baseline"]["accuracy"] > 0.9
    assert row["accuracy"] > report["baseline"]["accuracy"] - 0.1
    assert report["command"].startswith("nm-compress --checkpoint")

    said = shell(fresh / "python", "finetune.py", Path("small") / row["checkpoint"], cwd=folder)
    found = json.loads(said.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(fresh.parent)
    assert found["width"] == 12
    assert found["before"] == pytest.approx(row["accuracy"])
    assert found["after"] >= found["before"]
