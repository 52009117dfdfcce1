"""Checkpoints of strangers: read without running them, written so that they load without pickle."""

import argparse
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nm_lightning.compression.files.checkpoint import read
from nm_lightning.compression.files.inert import Inert, Unpickler, plain_data
from nm_lightning.errors import InputError


class Called:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Own(list):
    """A list that is not quite one."""


@pytest.mark.parametrize(
    "how", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=["zip", "protocol 4", "legacy"]
)
def test_what_people_save_is_read_and_nothing_is_run(how, in_tmp):
    weight = torch.randn(3, 4)
    people = {
        "act": nn.ReLU,
        "loss": nn.CrossEntropyLoss(),
        "function": torch.relu,
        "namespace": argparse.Namespace(depth=2),
        "array": np.ones(3),
        "own": Own([1, 2]),
        "shell": Called(os.system, "touch run"),
        "eval": Called(eval, "open('run', 'w')"),
        "deep": [{"import": Called(__import__, "this")}],
    }
    plain = {"root": Path("a/b"), "lr": np.float32(0.5), "depth": np.int64(3), "on": np.bool_(True), "set": {1}}
    state = {"weight": weight, "row": weight[1:], "half": weight.half(), "own": nn.Parameter(weight.clone())}
    torch.save({"state_dict": state, "hyper_parameters": people | plain, "dtype": torch.float16}, "c.ckpt", **how)
    found = read("c.ckpt")
    assert not Path("run").exists()
    for name, value in state.items():
        assert torch.equal(found["state_dict"][name], value)
    assert found["state_dict"]["row"].data_ptr() == found["state_dict"]["weight"][1:].data_ptr(), "still one storage"
    known = found["hyper_parameters"]
    assert {name: known[name] for name in plain} == {"root": "a/b", "lr": 0.5, "depth": 3, "on": True, "set": {1}}
    assert all(type(known[name]) in (int, float, bool, str, set) for name in plain)
    inert = [known[name] for name in people if name != "deep"] + [known["deep"][0]["import"]]
    assert all(isinstance(each, Inert) or issubclass(each, Inert) for each in inert)
    assert found["dtype"] is torch.float16


def test_functions_that_rebuild_tensors_stay_as_they_are():
    """A file that gives a known function other attributes has no say in the next file's tensors."""
    spoil = b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n(I1\nI2\ntstb."  # sets what the function expects
    with pytest.raises(TypeError):
        Unpickler(io.BytesIO(spoil)).load()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    assert pickle.loads(spoil).__defaults__ == (1, 2), "which pickle itself would do"
    torch._utils._rebuild_tensor_v2.__defaults__ = (None,)


def test_a_program_is_refused_in_one_line(in_tmp):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save("script.pt")
    with pytest.raises(InputError, match="is a TorchScript program"):
        read("script.pt")


def test_plain_data_loads_without_pickle(in_tmp):
    values = {
        "name": "net",
        "widths": (1, 2),
        "root": Path("x"),
        "lr": np.float64(0.5),
        "act": nn.ReLU,
        "classes": [nn.ReLU],
        "optimizer": {"lr": 0.1, "cls": torch.optim.SGD},
        "weight": nn.Parameter(torch.ones(2)),
    }
    kept, left_out = plain_data(values)
    assert left_out == ["act", "classes", "optimizer.cls"]
    torch.save(kept, "c.ckpt")
    loaded = torch.load("c.ckpt", weights_only=True)
    assert torch.equal(loaded.pop("weight"), torch.ones(2))
    assert loaded == {"name": "net", "widths": (1, 2), "root": "x", "lr": 0.5, "optimizer": {"lr": 0.1}}
