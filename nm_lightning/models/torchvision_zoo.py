"""torchvision's own classifiers by name, with its pretrained weights where asked for."""

from collections.abc import Callable

import torchvision
from torch import nn

from nm_lightning.errors import InputError
from nm_lightning.models.registry import register


@register("torchvision/(.*)", "torchvision/<name>", pretrained=True)
def build(name: str, num_classes: int, input_shape: tuple[int, int, int], weights: str | None = None) -> nn.Module:
    """Build `torchvision.models.<name>`; a pretrained head of another class count is replaced by a fresh one.

    Args:
        name: a name of `torchvision.models.list_models(module=torchvision.models)`.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image; torchvision's networks read 3 channels.
        weights: a member of the model's weights enum, such as `DEFAULT`; None for random weights.

    Raises:
        InputError: unknown name or weights, images that are not RGB, or weights that can't be downloaded.
    """
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"unknown model 'torchvision/{name}': see torchvision.models.list_models()")
    if input_shape[0] != 3:
        raise InputError(f"torchvision/{name} reads RGB images, the data has {input_shape[0]} channel(s)")
    # auxiliary training heads would return tuples; GoogLeNet's pretrained form drops its own
    plain = name == "inception_v3" or (name == "googlenet" and weights is None)
    options = {"aux_logits": False} if plain else {}
    if weights is None:
        return torchvision.models.get_model(name, num_classes=num_classes, **options)

    entry = find_weights(name, weights)
    try:
        model = torchvision.models.get_model(name, weights=entry, **options)
    except OSError as error:
        raise InputError(
            f"torchvision/{name}: the weights {weights} can't be downloaded ({error}); go online, "
            "or put the file into torch's hub folder"
        ) from error
    pretrained_classes = len(entry.meta["categories"])
    if pretrained_classes != num_classes:
        _replace_head(model, pretrained_classes, num_classes)
    return model


def find_weights(name: str, weights: str) -> torchvision.models.WeightsEnum:
    """The weights enum's member called `weights` for a torchvision model.

    Raises:
        InputError: the model has no weights of that name.
    """
    choices = torchvision.models.get_model_weights(name)
    try:
        return choices[weights.rpartition(".")[2]]
    except KeyError:
        names = ", ".join(choices.__members__)
        raise InputError(f"unknown weights {weights!r} of torchvision/{name}: choose from {names}") from None


def transforms(source: str) -> Callable:
    """The evaluation transform that belongs to pretrained weights.

    Args:
        source: model and weights, such as `torchvision/resnet50:DEFAULT`.

    Returns:
        A function from a PIL image, or a batch of uint8 images, to normalised tensors `(..., 3, H, W)`; it has
        `crop_size`, `mean` and `std`.
    """
    name, _, weights = source.removeprefix("torchvision/").partition(":")
    return find_weights(name, weights).transforms()


def _replace_head(model: nn.Module, pretrained_classes: int, num_classes: int) -> None:
    heads = [
        (layer_name, layer)
        for layer_name, layer in model.named_modules()
        if pretrained_classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None))
    ]
    layer_name, head = heads[-1]
    if isinstance(head, nn.Linear):
        fresh: nn.Module = nn.Linear(head.in_features, num_classes)
    else:
        fresh = nn.Conv2d(head.in_channels, num_classes, head.kernel_size)
    model.set_submodule(layer_name, fresh)
