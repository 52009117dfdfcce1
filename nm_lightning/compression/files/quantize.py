"""An ONNX file in 8 bits: onnxruntime's static quantisation after training, and how such files are run here."""

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nm_lightning.compression.structure.inputs import Inputs, tensors_in
from nm_lightning.errors import InputError

KINDS = ("int8",)


def quantize(path: str | Path, batches: Sequence[Inputs], kind: str = "int8") -> Path:
    """Write an ONNX file's network with weights and activations in 8 bits beside it, as `<stem>.int8.onnx`.

    Weights are symmetric and have a scale for each channel; activations' ranges are the extremes over the batches.
    Norms are folded into the layers before them first. See onnxruntime's `quantize_static` (Q/DQ format).

    Args:
        path: what `export` wrote.
        batches: unlabelled inputs as the network reads them.
        kind: `int8`.

    Returns:
        The new file.

    Raises:
        InputError: another kind, no batches, or onnxruntime is missing.
    """
    check_kind(kind)
    if not batches:
        raise InputError("quantize needs images: give some for calibration")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = Path(path)
    target = path.with_name(f"{path.stem}.{kind}.onnx")
    level = logging.root.level
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.root.setLevel(logging.ERROR)
        try:
            ready = Path(folder) / "ready.onnx"
            quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(ready), str(target), Feed(OnnxFile(path).names, batches), per_channel=True,
                weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8,
            )  # fmt: skip
        finally:
            logging.root.setLevel(level)
    return target


def check_kind(kind: str) -> None:
    """Raise `InputError` unless the kind is known and onnxruntime is installed."""
    if kind not in KINDS:
        raise InputError(f"unknown quantize {kind!r}: choose from {', '.join(KINDS)}")
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError("quantize needs onnxruntime: pip install onnxruntime")


class Feed:
    """Batches one after the other, as onnxruntime's calibration asks for them.

    Args:
        names: of the network's inputs, in order.
        batches: as the network reads them.
    """

    def __init__(self, names: Sequence[str], batches: Sequence[Inputs]):
        self.names, self.batches = names, batches
        self.rewind()

    def get_next(self) -> dict | None:
        """The next batch's arrays by name; None behind the last."""
        return next(self.left, None)

    def rewind(self) -> None:
        """Begin anew."""
        self.left = self._arrays()

    def _arrays(self) -> Iterator[dict]:
        for batch in self.batches:
            yield {name: each.cpu().numpy() for name, each in zip(self.names, tensors_in(batch), strict=True)}


class OnnxFile(nn.Module):
    """A file as a module on the CPU, run by onnxruntime with as many threads as torch has.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]

    def forward(self, *args: Inputs, **kwargs: Inputs) -> Tensor:
        """The first output, of inputs in the order that the network had."""
        given = tensors_in((*args, kwargs))
        arrays = {name: each.detach().cpu().numpy() for name, each in zip(self.names, given, strict=True)}
        return torch.from_numpy(self.session.run(None, arrays)[0])
