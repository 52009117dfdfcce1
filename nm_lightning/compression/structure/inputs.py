"""What a network is called with: one tensor, a tuple of inputs, or a dictionary of inputs by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nm_lightning.errors import InputError

Inputs = Tensor | tuple | dict[str, Any]


def check_inputs(inputs: Any, label: str = "example_input") -> None:
    """Raise `InputError` for what is no tensor, and holds none."""
    if not isinstance(inputs, (Tensor, tuple, Mapping)) or not tensors_in(inputs):
        raise InputError(
            f"{label} is a {type(inputs).__name__}: give one tensor, a batch of images, or a tuple or dictionary"
        )
    if not tensors_in(inputs)[0].numel():
        raise InputError(f"{label} holds no images: its shape is {shapes(inputs)}")


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The network's outputs.

    >>> call(nn.Bilinear(2, 2, 3), (torch.zeros(1, 2), torch.zeros(1, 2))).shape
    torch.Size([1, 3])
    """
    args, kwargs = arguments(inputs)
    with layer_by_layer():
        return model(*args, **kwargs)


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Torch's transformers run their layers one by one, not fused, so that whoever listens to a layer hears it."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def arguments(inputs: Inputs) -> tuple[tuple, dict[str, Any]]:
    """The positional arguments and those by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def tensors_in(inputs: Inputs) -> list[Tensor]:
    """All tensors, in order; the first counts the images."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def like(inputs: Inputs, model: nn.Module) -> Inputs:
    """The inputs on a network's device, and in its dtype if they are floating-point ones."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return inputs if parameter is None else to(inputs, parameter.device, parameter.dtype)


def to(inputs: Inputs, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs on another device, and in another dtype if they are floating-point ones."""
    return mapped(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None), inputs)


def first(inputs: Inputs, count: int) -> Inputs:
    """The first images: of every tensor that has one entry for each.

    >>> first((torch.zeros(8, 3), torch.zeros(5)), 2)[0].shape
    torch.Size([2, 3])
    """
    return _batched(lambda tensor: tensor[:count], inputs)


def repeated(inputs: Inputs, count: int) -> Inputs:
    """The first image so many times."""
    return _batched(lambda tensor: tensor[:1].expand(count, *tensor.shape[1:]).contiguous(), inputs)


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """Batches of so many images."""
    leader = tensors_in(inputs)[0]
    return [_batched(lambda tensor, at=at: tensor[at : at + size], inputs) for at in range(0, len(leader), size)]


def length(inputs: Inputs) -> int:
    """The number of images."""
    return len(tensors_in(inputs)[0])


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Batches as one.

    >>> joined([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(1, 3)}])["x"].shape
    torch.Size([3, 3])
    """
    return zipped(lambda *tensors: torch.cat(tensors), *parts)


def zipped(function: Callable[..., Tensor], *inputs: Inputs) -> Inputs:
    """A function's results for the tensors that have the same place in several inputs."""
    return pytree.tree_map(lambda *each: function(*each) if isinstance(each[0], Tensor) else each[0], *inputs)


def taken_from(batch: Any, example: Inputs) -> Any:
    """The inputs in a loader's batch, of the example's kind, a tuple or dictionary: labels and the like are left out.

    >>> sorted(taken_from({"x": 1, "mask": 2, "labels": 3}, {"x": torch.zeros(1), "mask": torch.zeros(1)}))
    ['mask', 'x']
    """
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (tuple, list, Mapping)):
        batch = batch[0]
    try:
        if isinstance(example, Mapping):
            return {key: batch[key] if isinstance(value, Tensor) else value for key, value in example.items()}
        return tuple(batch[i] if isinstance(value, Tensor) else value for i, value in enumerate(example))
    except (LookupError, TypeError):
        return batch


def clone(inputs: Inputs) -> Inputs:
    """The inputs in memory of their own."""
    return mapped(torch.clone, inputs)


def differentiable(inputs: Inputs) -> Inputs:
    """A copy that gradients flow back to, where it is of floating-point numbers; it may be written into."""
    return mapped(
        lambda each: each.clone().requires_grad_().clone() if each.is_floating_point() else each.clone(), inputs
    )


def dtype_of(inputs: Inputs) -> torch.dtype:
    """Of the first floating-point tensor; float32 where there is none."""
    return next((tensor.dtype for tensor in tensors_in(inputs) if tensor.is_floating_point()), torch.float32)


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with a function's result in the place of each tensor."""
    return function(inputs) if isinstance(inputs, Tensor) else pytree.tree_map_only(Tensor, function, inputs)


def shapes(inputs: Inputs) -> str:
    """What an error says of them.

    >>> shapes((torch.zeros(2, 3), torch.zeros(2)))
    '(2, 3) and (2,)'
    """
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))


def _batched(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    leader = tensors_in(inputs)[0]
    count = leader.shape[:1]
    return mapped(lambda tensor: function(tensor) if count and tensor.shape[:1] == count else tensor, inputs)
