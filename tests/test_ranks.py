"""Several processes: the same network as one process makes, the same accuracy to the image, one set of files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import FSDPStrategy
from torch.utils.data import BatchSampler

from callbacks import NeuronMergeCallback
from nm_lightning import compress
from nm_lightning.compression.checkpoint import write
from nm_lightning.compression.ranks import Ranks
from nm_lightning.data import build_data
from nm_lightning.errors import InputError
from nm_lightning.modules import ImageClassifier, evaluate
from nm_lightning.modules.evaluate import dealt

ROOT = Path(__file__).parent.parent
TEST_IMAGES = 41  # two ranks can't share them evenly
DATA = {"image_size": 16, "batch_size": 8, "num_workers": 0}
FLAGS = ["--device", "cpu", "--method", "prune", "merge", "reconstruct", "--ratio", "0.5", "--calibration_size", "300"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images in three classes, and a checkpoint of a small network with BatchNorm that tells them apart."""
    place = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 400), ("test", TEST_IMAGES)):
        for index in range(count):
            folder = place / "images" / split / f"class{index % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 200, (16, 16, 3), generator=generator)
            pixels[..., index % 3] += 25
            Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
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
    write(place / "trained.ckpt", module.state_dict(), {}, **known)
    run(place, *FLAGS, "--output", "single")
    return place


def command(script, *flags):
    return [sys.executable, str(script), "--checkpoint", "trained.ckpt", *flags]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


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


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


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
        "from nm_lightning.compression.ranks import Ranks\n"
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


@pytest.fixture
def one_thread():
    """As many as the ranks' processes have: float32 sums depend on how the threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("method", "replace"), [("merge", True), ("reconstruct", False)])
def test_the_callback_after_training_on_two_ranks(method, replace, place, one_thread):
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
    data = build_data("folder", data_dir=str(place / "images"), **DATA)
    data.setup("test")
    calibration = data.calibration_images("data", 300) if method == "reconstruct" else None
    single = compress(best, best.example_input, method, ratio=0.5, calibration=calibration).model.state_dict()
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
    with pytest.raises(InputError, match="output chooses badly by synthetic images"):
        NeuronMergeCallback(criterion="output", calibration="synthetic")


def test_fewer_images_than_ranks():
    class Four:
        world_size, global_rank = 4, 0

    with pytest.raises(InputError, match="calibration_size 3 leaves some of 4 ranks without an image"):
        build_data("digits").calibration_images("data", 3, ranks=Ranks(Four()))


@pytest.mark.parametrize("flags", [["--strategy", "ddp_spawn"], ["--strategy", "nonsense"], ["--devices", "0"]])
def test_what_no_launcher_can_start(flags, place):
    done = run(place, *FLAGS, "--devices", "2", *flags, "--output", "never", status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and flags[1] in line
    assert not (place / "never").exists()


def test_each_sampler_is_dealt_whole():
    """Shuffled, a part, or wrapped by Lightning: over all ranks each index comes once."""

    class Two:
        world_size = 2

        def __init__(self, rank):
            self.global_rank = rank

        def broadcast(self, value):
            return first  # what rank 0 has drawn

    data = torch.utils.data.TensorDataset(torch.arange(21))
    part = torch.utils.data.SubsetRandomSampler(range(5, 18))
    wrapped = DistributedSamplerWrapper(part, num_replicas=2, rank=0)
    for sampler, wanted in ((None, range(21)), (part, range(5, 18)), (wrapped, range(5, 18))):
        loader = torch.utils.data.DataLoader(data, 4, sampler=sampler)
        own = BatchSampler(getattr(getattr(sampler, "dataset", None), "_sampler", loader.sampler), 4, False)
        first = list(own)
        seen = [int(x) for rank in (0, 1) for (batch,) in dealt(loader, Ranks(Two(rank))) for x in batch]
        assert sorted(seen) == list(wanted)
