"""A network as a file that runs without this project: a `torch.export` program, or ONNX."""

import importlib.util
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from nm_lightning.compression.structure.inputs import Inputs, arguments, repeated
from nm_lightning.errors import InputError

FORMATS = ("pt2", "onnx")


def export(model: nn.Module, example_input: Inputs, path: str | Path) -> Path:
    """Write a network in evaluation mode, for batches of any size where the network allows it.

    Args:
        model: any network that `torch.export` can read; its mode is restored.
        example_input: a batch that it accepts.
        path: the file; its ending, `.pt2` or `.onnx`, is the format. Weights of an ONNX file over 2 GB lie beside it.

    Returns:
        The path.

    Raises:
        InputError: an unknown ending, or the packages that ONNX needs are missing.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = export(net, torch.zeros(1, 4), f"{folder}/net.pt2")
    ...     torch.export.load(file).module()(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """
    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise InputError(f"export {str(path)!r}: end the name with .pt2 or .onnx")
    check_format(path.suffix.removeprefix("."))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"export {str(path)!r} can't be written ({error.strerror}): give another folder") from error
    modes = [(module, module.training) for module in model.modules()]
    args, kwargs = arguments(repeated(example_input, 2))  # a batch of one would stay one
    shapes = pytree.tree_map(lambda each: {0: Dim.AUTO} if isinstance(each, Tensor) else None, args or kwargs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)
            if path.suffix == ".pt2":
                torch.export.save(program, path)
            else:
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
                exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
                exported.save(str(path), external_data=size > 1.5e9)
    finally:
        for module, training in modes:
            module.training = training
    return path


def check_format(name: str) -> None:
    """Raise `InputError` unless the format is known and its packages are installed."""
    if name not in FORMATS:
        raise InputError(f"unknown export {name!r}: choose from {', '.join(FORMATS)}")
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if name == "onnx" and missing:
        raise InputError(f"export to ONNX needs {' and '.join(missing)}: pip install onnx onnxscript")
