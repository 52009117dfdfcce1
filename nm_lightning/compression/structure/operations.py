"""What an operation does to its input: one table, by name, for all rooms.

Names are lower case without underscores, as module classes, functions and methods then spell them alike: `nn.ReLU6`,
`F.relu6` and `Tensor.relu6_` are all `relu6`.
"""

import operator
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SOLVABLE = (nn.Linear, *CONVOLUTIONS)  # a weight times the input's patches
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM = re.compile("norm|grn", re.IGNORECASE)  # how classes of normalisations are called
LAYERS = (*SOLVABLE, *TRANSPOSED, *CHANNEL_NORMS, *MIXING_NORMS, nn.PReLU)


@dataclass(frozen=True)
class Operation:
    """Facts about an operation.

    Attributes:
        kind: `entry` (each entry for itself), `pool`, `resample`, `pad` (over space, channel by channel), `reduce`,
            `move` (entries only change their place), `sum`, `product`, `quotient`, `meet` (two or three values entry by
            entry, in another way), `assign`, `layer` (of those that `torch.nn.functional` has, where the weights are
            arguments).
        homogeneous: whether `f(s x) = s f(x)` for every `s >= 0`.
        idle: whether it leaves its input as it is when the network is evaluated.
        limit: of a rectifier, the value above which it saturates, infinite for ReLU; None for what is no rectifier.
        twin: of one that writes into its input, the function that does the same and does not.
    """

    kind: str
    homogeneous: bool = False
    idle: bool = False
    limit: float | None = None
    twin: object = None


def assign_into(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value`, as an operation with a result."""
    tensor[index] = value
    return tensor


def assigned(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """The same in a copy."""
    return assign_into(tensor.clone(), index, value)


def _all(words: str, *like: object, **facts: object) -> dict[str, Operation]:
    return {word: Operation(*like, **facts) for word in words.split()}


OPERATIONS: dict[str, Operation] = {
    "relu": Operation("entry", homogeneous=True, limit=float("inf")),
    "relu6": Operation("entry", limit=6.0),
    **_all("identity dropout dropout2d stochasticdepth", "entry", homogeneous=True, idle=True),
    **_all(
        "leakyrelu dropout1d dropout3d featuredropout droppath dropblock2d contiguous clone detach neg abs float to "
        "typeas half double bfloat16 rrelu alphadropout",
        "entry",
        homogeneous=True,
    ),
    **_all(
        "gelu silu elu selu celu mish softplus sigmoid tanh hardtanh hardswish hardsigmoid logsigmoid softsign clamp "
        "clip exp sqrt rsqrt pow square threshold hardshrink softshrink tanhshrink reciprocal erf zeroslike oneslike "
        "emptylike fulllike randlike randnlike bernoulli log log2 log10 log1p exp2 expm1 sin cos atan sinh cosh asinh "
        "round floor ceil trunc frac sign erfc nantonum isnan isinf isfinite logicalnot invert bool int",
        "entry",
    ),
    # the digit before the last letter counts the dimensions of space
    **{
        f"{kind}pool{d}d": Operation("pool", homogeneous=True)
        for kind in ("max", "avg", "adaptivemax", "adaptiveavg", "lp")
        for d in (1, 2, 3)
    },
    **_all("interpolate upsample upsamplingnearest2d upsamplingbilinear2d", "resample", homogeneous=True),
    "pad": Operation("pad"),
    **{
        f"{kind}pad{d}d": Operation("pad")
        for kind in ("zero", "constant", "reflection", "replication")
        for d in (1, 2, 3)
    },
    **_all("mean sum amax amin", "reduce", homogeneous=True),
    **_all(
        "flatten unflatten reshape view permute transpose swapaxes movedim squeeze t unsqueeze getitem chunk split "
        "unbind narrow cat concat stack expand roll pixelshuffle pixelunshuffle channelshuffle expandas flip repeat "
        "select reshapeas viewas",
        "move",
        homogeneous=True,
    ),
    **_all("add sub rsub", "sum"),
    "iadd": Operation("sum", twin=operator.add),
    "isub": Operation("sum", twin=operator.sub),
    **_all("mul multiply", "product"),
    **_all(
        "gt lt ge le eq ne greater less greaterequal lessequal maximum minimum fmax fmin logicaland logicalor and or "
        "where maskedfill",
        "meet",
    ),
    "imul": Operation("product", twin=operator.mul),
    **_all("div divide truediv", "quotient"),
    "itruediv": Operation("quotient", twin=operator.truediv),
    "assigninto": Operation("assign", twin=assigned),
    **_all("linear conv1d conv2d conv3d batchnorm layernorm prelu", "layer"),
}

UNKNOWN = Operation("")


def facts_of(name: str) -> Operation:
    """What is known of an operation; one of no kind where nothing is.

    >>> facts_of("relu6").limit, facts_of("gelu").homogeneous
    (6.0, False)
    """
    return OPERATIONS.get(name, UNKNOWN)


def mixes_channels(layer: object) -> bool:
    """Whether a layer is a normalisation over all channels: once it is narrow, over the survivors alone."""
    return isinstance(layer, MIXING_NORMS) or is_own_norm(layer)


def is_own_norm(layer: object) -> bool:
    """Whether it is a normalisation that somebody wrote out, as RMSNorm or global response normalisation often is.

    A module that is called so, without buffers, all of whose parameters are its own and have a number for each channel;
    its parts, if it has some, are activations and the like. One without parameters has a `normalized_shape`.
    """
    if not isinstance(layer, nn.Module) or type(layer).__module__.startswith("torch."):
        return False
    if isinstance(layer, LAYERS) or not NORM.search(type(layer).__name__) or {*layer.buffers()}:
        return False
    own = dict(layer.named_parameters())
    if not own:
        shape = getattr(layer, "normalized_shape", None)
        return isinstance(shape, (tuple, list)) and len(shape) == 1
    sizes = {(tensor.numel(), max(tensor.shape, default=0)) for tensor in own.values()}
    return len(sizes) == 1 and len(set(*sizes)) == 1 and not any("." in name for name in own)


def channels_of(norm: nn.Module) -> int:
    """The number of channels of a normalisation that somebody wrote out."""
    own = next(norm.parameters(), None)
    return own.numel() if own is not None else norm.normalized_shape[0]
