"""What a batch and an output hold, in whatever container: inputs, labels, logits."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from nm_lightning.errors import InputError

INPUTS = ("image", "images", "pixel_values", "input", "inputs", "x")
LABELS = ("label", "labels", "target", "targets", "y")
Key = str | int | None  # a name, or a place in a tuple; None for the names above, or for the order


def inputs_and_labels(batch: Any, input_key: Key = None, label_key: Key = None) -> tuple[Any, Any]:
    """The inputs and the labels of a batch, None for what it does not hold.

    Of dictionaries, named tuples and dataclasses by `INPUTS` and `LABELS`, of tuples the first two, of a tensor itself.

    >>> inputs_and_labels({"image": "inputs", "label": "labels", "path": "..."})
    ('inputs', 'labels')
    >>> inputs_and_labels(("inputs", "labels", "index"), label_key=2)
    ('inputs', 'index')
    """
    if isinstance(batch, Tensor):
        return batch, None
    named, order = _fields(batch), list(batch) if isinstance(batch, (tuple, list)) else []

    def find(key: Key, names: tuple[str, ...], place: int) -> Any:
        if isinstance(key, int):
            return order[key] if -len(order) <= key < len(order) else None
        if key is not None:
            return named.get(key)
        found = next((named[name] for name in names if name in named), None)
        return order[place] if found is None and place < len(order) else found

    return find(input_key, INPUTS, 0), find(label_key, LABELS, 1)


def logits_of(output: Any) -> Any:
    """The logits of a network's output: `logits` by name, the first of a tuple, or the output itself."""
    named = _fields(output)
    if "logits" in named:
        return named["logits"]
    return output[0] if isinstance(output, (tuple, list)) and output else output


def length_of(batch: Any) -> int:
    """How many images a batch holds: the length of its first tensor; 1 where it has none.

    >>> import torch
    >>> length_of({"path": "here", "image": torch.zeros(8, 3)})
    8
    """
    tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
    return next(map(len, tensors), 1)


def hits(logits: Any, labels: Any, threshold: float = 0.0) -> Tensor | None:
    """Whether each image's class is its label's `(N,)`; None where these are no classes of images.

    Args:
        logits: `(N, classes)`; the largest says which. Or one for each image, `(N,)` or `(N, 1)`.
        labels: `(N,)` or `(N, 1)`, whole numbers; of one logit 0 and 1 of any type.
        threshold: above which one logit means class 1.

    >>> import torch
    >>> hits(torch.tensor([[-2.0], [3.0], [1.0]]), torch.tensor([0, 1, 0])).tolist()
    [True, True, False]
    """
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or not logits.is_floating_point():
        return None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    logits = logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 1 else logits
    if labels.ndim != 1 or logits.ndim not in (1, 2) or len(logits) != len(labels):
        return None
    if logits.ndim == 1:
        return (logits > threshold) == (labels > 0) if bool(((labels == 0) | (labels == 1)).all()) else None
    return None if labels.is_floating_point() else logits.argmax(dim=1) == labels


def threshold_of(logits: Any) -> float:
    """Above which one logit means class 1: 0, or 0.5 where a sigmoid, as autograd remembers it, made it a probability.

    >>> import torch
    >>> threshold_of(torch.ones(3, 1, requires_grad=True).sigmoid()[:, 0])
    0.5
    """
    node = getattr(logits, "grad_fn", None)
    while node is not None and len(node.next_functions) == 1 and "Sigmoid" not in node.name():
        if not any(word in node.name() for word in ("View", "Select", "Slice", "Squeeze", "Reshape", "Alias", "Copy")):
            break
        node = node.next_functions[0][0]
    return 0.5 if node is not None and node.name().startswith("Sigmoid") else 0.0


def read(loader: Iterable) -> Iterator:
    """A loader's batches.

    Raises:
        InputError: its files have gone, or it raises something.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except InputError:
            raise
        except Exception as error:  # whatever the data set raises; of a worker, the message is a traceback
            line = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            gone = ", has it changed?" if isinstance(error, OSError) else f": {type(error).__name__}:"
            raise InputError(f"the data set can't be read{gone} {line}") from error
        yield batch


def _fields(value: Any) -> Mapping[str, Any]:
    """The entries that have names: of a dictionary, a named tuple, a dataclass."""
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "_asdict"):
        return value._asdict()
    return vars(value) if is_dataclass(value) and hasattr(value, "__dict__") else {}
