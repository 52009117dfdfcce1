"""compress.py in several processes: one process' network and accuracy to the image, one set of files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nm_lightning.compression import Recipe
from nm_lightning.compression.files.checkpoint import write
from nm_lightning.data import build_data
from nm_lightning.modules import ImageClassifier
from tests import ROOT
from tests.datasets import write_colours
from tests.processes import environment, free_port

pytestmark = pytest.mark.xdist_group("ranks")  # they share `place`, and the processors
TEST_IMAGES = 41  # two ranks can't share them evenly
DATA = {"image_size": 16, "batch_size": 8, "num_workers": 0}
FLAGS = ["--device", "cpu", "--method", "prune", "merge", "reconstruct", "--ratio", "0.5", "--calibration_size", "300"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images in three classes, and a checkpoint of a small network with BatchNorm that tells them apart."""
    place = tmp_path_factory.mktemp("ranks")
    write_colours(place / "images", {"train": 400, "test": TEST_IMAGES})
    data = build_data("folder", data_dir=str(place / "images"), **DATA)
    data.setup("fit")
    torch.manual_seed(0)
    module = ImageClassifier("resnet8", 3, (3, 16, 16))
    optimiser = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        for batch in data.train_dataloader():
            optimiser.zero_grad()
            images, labels = data.on_after_batch_transfer(batch, 0)
            torch.nn.functional.cross_entropy(module(images), labels).backward()
            optimiser.step()
    known = {"hyper_parameters": dict(module.hparams), "datamodule_hyper_parameters": dict(data.hparams)}
    write(place / "trained.ckpt", module.state_dict(), {}, Recipe(), **known)
    run(place, *FLAGS, "--output", "single")
    return place


def command(script, *flags):
    return [sys.executable, str(script), "--checkpoint", "trained.ckpt", *flags]


def run(place, *flags, script=ROOT / "compress.py", status=0):
    done = subprocess.run(
        command(script, *flags), cwd=place, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def same_as_single(place, output):
    """The report and the checkpoints are those of one process, but for the seconds."""
    reports = [json.loads((place / name / "report.json").read_text()) for name in ("single", output)]
    for report, ranks in zip(reports, (1, 2), strict=True):
        assert report.pop("ranks") == ranks
        del report["command"]
        for row in report["results"]:
            del row["seconds"]
            for site in row["sites"]:
                site["error"] = site["error"] and pytest.approx(site["error"], rel=1e-4, abs=1e-6)
    assert reports[0] == reports[1]
    for row in reports[0]["results"]:
        assert row["accuracy"] * TEST_IMAGES == pytest.approx(round(row["accuracy"] * TEST_IMAGES), abs=1e-9)
        first, second = (
            torch.load(place / name / Path(row["checkpoint"]).name, weights_only=True)["state_dict"]
            for name in ("single", output)
        )
        assert first.keys() == second.keys()
        for key, value in first.items():
            if row["method"] == "reconstruct":
                torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(second[key], value), key
    assert sorted(os.listdir(place / output)) == sorted(os.listdir(place / "single"))


def test_two_ranks_on_one_machine(place):
    done = run(place, *FLAGS, "--devices", "2", "--output", "two")
    assert "2 ranks, DDPStrategy" in done.stdout
    assert done.stdout.count("report, plot and checkpoints") == 1
    same_as_single(place, "two")
    assert not list(place.glob(".two*"))


def test_two_ranks_refit_alike(place):
    """Also where few images are enough: they sum to what one process sums."""
    flags = ["--device", "cpu", "--method", "merge", "--refit", "1", "--calibration_size", "300"]
    found = []
    for output, more in (("refit", []), ("refit-two", ["--devices", "2"])):
        run(place, *flags, *more, "--output", output)
        (row,) = json.loads((place / output / "report.json").read_text())["results"]
        assert not row["notes"] and all(0 < site["error"] < 1 for site in row["sites"])
        found.append(torch.load(place / output / Path(row["checkpoint"]).name, weights_only=True)["state_dict"])
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-5)
    rough = torch.load(place / "single" / "merge_l2-norm_0.5.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(rough[key], value) for key, value in found[0].items())


def test_two_ranks_analyse_alike(place):
    """The images that two ranks share are those that one sees: each counts once."""
    reports = []
    for output, more in (("analysis", []), ("analysis-two", ["--devices", "2"])):
        run(place, "--device", "cpu", "--method", "prune", "--analyse", "33", *more, "--output", output)
        reports.append(json.loads((place / output / "report.json").read_text()))
        assert reports[-1].pop("ranks") == 1 + bool(more)
        del reports[-1]["command"]
    assert reports[0] == reports[1] and reports[0]["images"] == 33


def torchrun(place, output, prefixes=([], []), address="127.0.0.1", **more):
    """A node process for each prefix of a command, both in the same folder."""
    port, running = free_port(), []
    for node, prefix in enumerate(prefixes):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}"]
        launcher += ["--nproc_per_node=1", f"--master_addr={address}", f"--master_port={port}"]
        script = command(ROOT / "compress.py", *FLAGS, "--num_nodes", "2", "--output", output)[1:]
        running.append(
            subprocess.Popen(
                [*prefix, *launcher, *script],
                cwd=place,
                env=environment(**more),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(outputs)
    return outputs


def test_two_machines_by_torchrun(place):
    first, second = torchrun(place, "nodes")
    assert "2 ranks, DDPStrategy" in first and "report, plot" not in second
    same_as_single(place, "nodes")


@pytest.fixture
def two_hosts():
    """Two network namespaces with an address each, joined by a cable."""
    names = [f"nm{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    if shutil.which("ip") is None or ip("netns", "add", names[0]).returncode:
        pytest.skip("needs iproute2 and the right to make network namespaces")
    ip("netns", "add", names[1])
    ip("link", "add", "nm0", "netns", names[0], "type", "veth", "peer", "name", "nm0", "netns", names[1])
    for number, name in enumerate(names, start=1):
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "nm0")
        ip("-n", name, "link", "set", "nm0", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield [["ip", "netns", "exec", name] for name in names]
    for name in names:
        ip("netns", "del", name)


def test_two_machines_with_their_own_addresses(place, two_hosts):
    torchrun(place, "hosts", two_hosts, "10.77.0.1", GLOO_SOCKET_IFNAME="nm0")
    same_as_single(place, "hosts")


def test_two_machines_by_slurm(place):
    """With the variables that srun sets on each of two nodes."""
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "compress", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    flags = command(ROOT / "compress.py", *FLAGS, "--num_nodes", "2", "--output", "slurm")
    running = [
        subprocess.Popen(flags, cwd=place, env=environment(**job, SLURM_PROCID=rank, SLURM_NODEID=rank))
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    same_as_single(place, "slurm")


def test_torchrun_and_the_flags_disagree(place, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    done = run(place, *FLAGS, "--devices", "2", "--output", "never", status=2)
    assert done.stderr.splitlines() == [
        "error: torchrun started 4 processes, not those of --devices 2 --num_nodes 1: give --devices 2 --num_nodes 2"
    ]


def test_a_killed_rank_stops_the_others(place, tmp_path):
    """Nothing is left behind, and the same command succeeds when nobody kills it."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, compress\n"
        "from nm_lightning.compression.statistics.ranks import Ranks\n"
        "total, calls = Ranks.total, []\n"
        "def dying(self, *tensors):\n"
        "    calls.append(self.rank)\n"
        f"    if self.rank == 1 and len(calls) == 9:\n        os.kill(os.getpid(), signal.{signal.SIGKILL.name})\n"
        "    return total(self, *tensors)\n"
        "Ranks.total = dying\n"
        "compress.main()\n"
    )
    before = (place / "trained.ckpt").read_bytes()
    flags = [*FLAGS, "--method", "reconstruct", "--devices", "2", "--output", "killed"]
    done = run(place, *flags, script=script, status=1)
    assert "error: another rank is gone, nothing was written: run it again" in done.stderr
    assert "Traceback" not in done.stderr
    assert (place / "trained.ckpt").read_bytes() == before
    assert not list(place.glob("*killed*")) and not list(place.glob(".killed*"))
    run(place, *flags)
    assert (place / "killed" / "report.json").is_file()


@pytest.mark.parametrize("flags", [["--strategy", "ddp_spawn"], ["--strategy", "nonsense"], ["--devices", "0"]])
def test_what_no_launcher_can_start(flags, place):
    done = run(place, *FLAGS, "--devices", "2", *flags, "--output", "never", status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and flags[1] in line
    assert not (place / "never").exists()


def test_two_ranks_finetune_on_all_training_images(place):
    """Each has its share of them, and gradients are averaged: the network is one, and closer to the original."""
    flags = ["--device", "cpu", "--devices", "2", "--method", "prune", "--ratio", "0.5"]
    run(place, *flags, "--finetune", "2", "--finetune_on", "training", "--output", "tuned")
    data = build_data("folder", data_dir=str(place / "images"), **DATA)
    images = data.calibration_images("data", 200)
    logits = []
    for file in ("trained.ckpt", "single/prune_l2-norm_0.5.ckpt", "tuned/prune_l2-norm_0.5.ckpt"):
        module = ImageClassifier.load_from_checkpoint(place / file, weights_only=True).eval()
        with torch.no_grad():
            logits.append((module(images) / 2).log_softmax(1))
    original, pruned, tuned = logits
    apart = [float((original.exp() * (original - other)).sum(1).mean()) for other in (pruned, tuned)]
    assert apart[1] < 0.5 * apart[0]
