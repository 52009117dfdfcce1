"""Networks that several test files share: small, random, or strange."""

import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning.compression.refine.norms import recalibrate_norms
from nm_lightning.models import build_model

ARCHITECTURES = [
    ("lenet_300_100", (1, 28, 28)),
    ("vgg11", (3, 32, 32)),
    ("resnet20", (3, 32, 32)),
    ("wide_resnet_10_2", (3, 32, 32)),
    ("alexnet", (3, 32, 32)),
    ("vit_64_2", (3, 16, 16)),
    ("torchvision/squeezenet1_1", (3, 64, 64)),
    ("torchvision/resnet18", (3, 64, 64)),
    ("torchvision/vgg11_bn", (3, 32, 32)),
    ("torchvision/densenet121", (3, 64, 64)),
]


def random_network(name, num_classes, shape, seed=0):
    """A network with random weights and BatchNorm statistics that are not trivial, in eval mode."""
    torch.manual_seed(seed)
    model = build_model(name, num_classes, shape)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


class Residual(nn.Module):
    """A stem, two residual blocks with one norm each, and a head."""

    def __init__(self, norm: bool = True, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1, bias=not norm),
                nn.BatchNorm2d(16) if norm else nn.Identity(),
                activation(),
                nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular", bias=False),
                nn.BatchNorm2d(8) if norm else nn.Identity(),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        features = self.stem(images)
        for block in self.blocks:
            features = features + block(F.relu(features))
        return self.head(F.relu(features).mean(dim=(2, 3)))


def images(count=64, shape=(3, 8, 8), seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def lively(model):
    """BatchNorm statistics of the images themselves."""
    recalibrate_norms(model.eval(), [images(256, seed=3)])
    return model.eval()


class Graph(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Attention(nn.Module):
    """Self-attention with layers of its own for q, k and v, and the number of heads as an attribute."""

    def __init__(self, width, heads, head_dim, fused):
        super().__init__()
        self.heads, self.head_dim, self.fused = heads, head_dim, fused
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(dim=-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 3, self.bias)


def rewritten(model, x):
    """In-place operations whose results are dropped, read again, or read under the old name."""
    x = model.stem(x)
    F.relu_(x)
    x = x.add_(model.mix(x)).relu_()
    z = model.inplace(x)
    return model.head((model.last(z) + x).mean(dim=(2, 3)))


STRANGE = {
    "in place": rewritten,
    "a constant in the code": lambda m, x: m.head(
        F.relu(m.mix(F.relu(m.stem(x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))))).mean(dim=(2, 3))
    ),
    "two sites in a mixing norm": lambda m, x: m.wide(
        m.group(torch.cat([F.relu(m.stem(x)), F.relu(m.second(x))], dim=1)).mean(dim=(2, 3))
    ),
    "a broadcast addition": lambda m, x: m.head(
        (s := F.relu(m.stem(x))).add(m.last(F.relu(m.mix(s.mean(dim=(2, 3), keepdim=True))))).mean(dim=(2, 3))
    ),
    "norm over tokens": lambda m, x: m.head(m.tokens(m.down(F.relu(m.up(m.stem(x).flatten(2).mT)))).mean(dim=1)),
    "alpha": lambda m, x: m.head(torch.add(s := m.stem(x), m.last(F.relu(m.mix(s))), alpha=10).mean(dim=(2, 3))),
    "one norm for two": lambda m, x: m.head(
        m.last(F.relu(m.norm(m.mix(F.relu(m.norm(m.bare(F.relu(m.stem(x))))))))).mean(dim=(2, 3))
    ),
    "keywords": lambda m, x: m.head(input=F.relu(m.mix(input=F.relu(m.stem(input=x)))).mean(dim=(2, 3))),
    "a linear that scales": lambda m, x: m.scaled(F.relu(m.up(F.relu(m.stem(x)).mean(dim=(2, 3))))),
}


class Strange(nn.Module):
    """Layers for the forwards above."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.stem, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.mix, self.last = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 12, 1, bias=False)
        self.bare = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm, self.tokens, self.group = nn.BatchNorm2d(12), nn.BatchNorm1d(36), nn.GroupNorm(1, 24)
        self.up, self.down, self.inplace = nn.Linear(12, 24), nn.Linear(24, 12), nn.ReLU(inplace=True)
        self.head, self.wide, self.scaled = nn.Linear(12, 5), nn.Linear(24, 5), Scaled(24, 5)

    def forward(self, x):
        return self.function(self, x)


PIECES = (
    "conv",
    "norm",
    "activation",
    "pool",
    "depthwise",
    "grouped",
    "residual",
    "bottleneck",
    "concatenation",
    "gate",
)
PIECES += ("excitation", "shuffle", "chunk", "twice", "transposed")
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Identity)


class Random(nn.Module):
    """Pieces in a row, then a head: each piece is a name and a number that it makes its choices by."""

    def __init__(self, pieces, ending):
        super().__init__()
        self.pieces, self.ending = pieces, ending
        self.layers = nn.ModuleList()
        channels = 8
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        for piece, number in pieces:
            made, channels = self.make(piece, number, channels)
            self.layers.append(nn.ModuleList(made))
        space = 16 if ending == "flatten" else 1
        self.head = nn.Linear(channels * space, 4)
        self.second = nn.Linear(channels * space, 4) if ending == "two" else None

    def make(self, piece, number, c):
        d = (8, 12, 16)[number % 3]
        conv, bias = nn.Conv2d, bool(number % 2)
        if piece == "conv":
            return [conv(c, d, 3, padding=1, bias=bias)], d
        if piece == "norm":
            return [nn.BatchNorm2d(c)], c
        if piece == "activation":
            return [ACTIVATIONS[number % len(ACTIVATIONS)]()], c
        if piece == "depthwise":
            return [conv(c, c, 3, padding=1, groups=c, bias=bias)], c
        if piece == "grouped":
            return [conv(c, d, 3, padding=1, groups=(2, 4)[number % 2], bias=bias)], d
        if piece == "residual":
            return [conv(c, c, 3, padding=1, bias=bias), nn.BatchNorm2d(c)], c
        if piece == "bottleneck":
            return [conv(c, d, 1, bias=False), nn.BatchNorm2d(d), conv(d, c, 3, padding=1)], c
        if piece == "concatenation":
            return [conv(c, 4, 3, padding=1)], c + 4
        if piece == "gate":
            return [conv(c, c, 1)], c
        if piece == "excitation":
            return [nn.Linear(c, 4), nn.Linear(4, c)], c
        if piece == "chunk":
            return [conv(c, 2 * d, 1)], d
        if piece == "twice":
            return [conv(c, c, 3, padding=1)], c
        if piece == "transposed":
            return [nn.ConvTranspose2d(c, d, 3, padding=1, bias=bias)], d
        return [], c  # pool, shuffle

    def forward(self, x):
        x = self.stem(x)
        for (piece, _), layers in zip(self.pieces, self.layers, strict=True):
            x = self.run(piece, list(layers), x)
        x = F.adaptive_avg_pool2d(x, 4 if self.ending == "flatten" else 1).flatten(1)
        return self.head(x) if self.second is None else self.head(x) + self.second(x)

    def run(self, piece, layers, x):
        if piece == "pool":
            return F.max_pool2d(x, 3, 1, 1)
        if piece == "residual":
            return x + layers[1](layers[0](F.relu(x)))
        if piece == "bottleneck":
            return x + layers[2](F.relu(layers[1](layers[0](x))))
        if piece == "concatenation":
            return torch.cat([x, F.relu(layers[0](x))], 1)
        if piece == "gate":
            return x * layers[0](x).sigmoid()
        if piece == "excitation":
            return x * layers[1](F.relu(layers[0](x.mean((2, 3))))).sigmoid()[:, :, None, None]
        if piece == "shuffle":
            n, c, h, w = x.size()
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if piece == "chunk":
            a, b = layers[0](x).chunk(2, 1)
            return a * torch.tanh(b)
        if piece == "twice":
            return layers[0](F.relu(layers[0](x)))
        for layer in layers:
            x = layer(x)
        return x
