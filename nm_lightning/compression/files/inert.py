"""Reading checkpoints without trusting them: tensors and plain data are rebuilt, all else becomes a placeholder.

Nothing that a file names is imported or called, but for the few constructors of tensors and numbers listed here.
"""

import collections
import pickle
import posixpath
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nm_lightning.errors import InputError


class Inert:
    """Stands for an object or a class that a file names: it takes whatever the file does to it, and does nothing."""

    dump_patches = False  # asked for in files of torch's first years

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """One more that does nothing."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """What calling it gives."""
        return self

    def ignore(self, *args: Any) -> None:
        """What a file fills an object with."""

    __setstate__ = __setitem__ = append = extend = add = ignore


class NumberType:
    """The type of a numpy scalar as a file tells it; numpy's own would believe a file too much."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _number(kind: NumberType, data: bytes) -> Any:
    """A numpy scalar's value as Python's own number or text."""
    if not re.fullmatch("[biufcSU][0-9]+", kind.code) or kind.order not in tuple("<>=|"):
        return Inert()
    return np.frombuffer(data, kind.order + kind.code)[0].item()


def _text(*parts: str) -> str:
    return posixpath.join(*map(str, parts)) if parts else "."


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # pickle's own way to spell bytes; other encodings are none of it


# by name, what rebuilds tensors and plain data; functions as `partial`s, whose attributes a file can't reach
KNOWN: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, dict, list, tuple, int, float, complex, bool, str,
                                                       bytes, bytearray, slice, range)},
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": partial(dict),
    "collections.defaultdict": partial(lambda *_: {}),
    "_codecs.encode": partial(_bytes),
    **{f"torch._utils.{name}": partial(getattr(torch._utils, name)) for name in (
        "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_sparse_tensor", "_rebuild_qtensor",
        "_rebuild_meta_tensor_no_storage")},
    "torch._utils._rebuild_parameter_with_state": partial(
        lambda data, requires_grad, hooks, state: nn.Parameter(data, requires_grad)),
    "torch._tensor._rebuild_from_type_v2": partial(lambda build, kind, args, state: build(*args)),
    "torch.serialization._get_layout": partial(lambda name: getattr(torch, name.rpartition(".")[2], None)
                                               if str(name).startswith("torch.") else None),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype | torch.qscheme)},
    "numpy.dtype": partial(NumberType),
    **{f"numpy.{core}.multiarray.scalar": partial(_number) for core in ("core", "_core")},
    **{f"pathlib{room}.{name}": partial(_text) for room in ("", "._local") for name in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")},
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Pickle's own, with a placeholder for every name that is not in `KNOWN`; paths become text."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of the file."""
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        known = KNOWN.get(f"{module}.{name}")
        return known if known is not None else type(name.rpartition(".")[2], (Inert,), {"__module__": module})


def _load(file: Any, **options: Any) -> Any:
    return Unpickler(file, **options).load()


INERT = SimpleNamespace(__name__="inert", Unpickler=Unpickler, load=_load)  # what `torch.load` takes for `pickle`


def load_inert(path: str | Path) -> Any:
    """`torch.load` on the CPU, with `Inert` placeholders for all that is neither tensor nor plain data.

    Raises:
        InputError: a TorchScript archive, which is a program.
        Exception: whatever broken bytes lead to.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise InputError(f"checkpoint {str(path)!r} is a TorchScript program: save the module's state_dict()")
    return torch.load(path, map_location="cpu", pickle_module=INERT, weights_only=False)


def plain_data(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a dictionary loads with `weights_only=True`, and the names of what does not and is left out.

    Numpy's numbers become Python's, paths become text.

    >>> plain_data({"lr": np.float32(0.5), "root": Path("data"), "net": {"act": nn.ReLU, "depth": 2}})
    ({'lr': 0.5, 'root': 'data', 'net': {'depth': 2}}, ['net.act'])
    """
    kept, left_out = {}, []
    for name, value in values.items():
        if isinstance(value, Mapping):
            kept[name], others = plain_data(value)
            left_out += [f"{name}.{other}" for other in others]
        else:
            try:
                kept[name] = _plain(value)
            except TypeError:
                left_out.append(str(name))
    return kept, left_out


def _plain(value: Any) -> Any:
    """A value as plain data; raises `TypeError` where it is none."""
    if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":
        return value.item()
    if isinstance(value, Mapping):
        kept, left_out = plain_data(value)
        if not left_out:
            return kept
    if type(value) in (list, tuple, set):
        return type(value)(_plain(each) for each in value)
    raise TypeError(f"a {type(value).__name__} is no plain data")
