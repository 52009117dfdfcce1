"""No half result, whatever happens, and nothing left behind for good."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nm_lightning import compress, load, save
from nm_lightning.compression.files.partial import alone, hold, sweep
from nm_lightning.errors import InputError
from tests.processes import environment


@pytest.fixture(scope="module")
def small():
    return compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_is_one_line_and_the_last_result_stays(error, small, tmp_path, monkeypatch):
    save(small, tmp_path / "small.pt")
    before = (tmp_path / "small.pt").read_bytes()

    def full(content, path):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"small.pt' can't be written \(.*\): make room") as caught:
        save(small, tmp_path / "small.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]
    assert (tmp_path / "small.pt").read_bytes() == before


KILLED = """
import os, signal, sys, torch
from torch import nn
from nm_lightning import compress, save
small = compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 4))
torch.save = lambda content, path: os.kill(os.getpid(), signal.SIGKILL)
save(small, sys.argv[1])
"""


def test_what_a_killed_process_left_is_swept(small, tmp_path):
    script = [sys.executable, "-c", KILLED, str(tmp_path / "small.pt")]
    assert subprocess.run(script, env=environment(), timeout=120, check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial"), "no half result"
    save(small, tmp_path / "small.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]
    load(tmp_path / "small.pt", into=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_what_a_living_process_holds_stays(tmp_path):
    for name in ("held", "dead", "other"):
        (tmp_path / name).mkdir()
    held = hold(tmp_path / "held")
    with alone(tmp_path):
        assert sweep(tmp_path, "held|dead") == [tmp_path / "held"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "other"]
    os.close(held)
    assert sweep(tmp_path, "held") == []
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
