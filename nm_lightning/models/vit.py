"""ViT (Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021), plain as of Beyer et al. (arXiv 2205.01580)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nm_lightning.models.registry import register

HEAD_DIM = 32


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: channels of a token.
        heads: number of heads, a divisor of `dim`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(N, T, dim)` to tokens of the same shape."""
        images, count, _ = tokens.shape
        query, key, value = self.qkv(tokens).reshape(images, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two Linear layers with GELU between; each after a norm and beside a shortcut.

    Args:
        dim: channels of a token.
        heads: of the attention.
        hidden: neurons between the two Linear layers, the ones that compression removes.
    """

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `(N, T, dim)` to tokens of the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


@register(
    r"vit_(\d+)_(\d+)", "vit_{32 heads}_{depth}", hidden=lambda dim, depth: depth if dim % HEAD_DIM == 0 else None
)
class ViT(nn.Module):
    """Patches of 4 pixels (16 of images over 64), learned positions, the mean of the tokens before the classifier.

    Args:
        dim: channels of a token, in heads of 32.
        depth: number of blocks.
        num_classes: number of output logits.
        input_shape: `(channels, height, width)` of one image.
        widths: hidden neurons of each block; None for four times `dim`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_classes: int,
        input_shape: tuple[int, int, int],
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        channels, height, width = input_shape
        patch = 4 if max(height, width) <= 64 else 16
        self.patches = nn.Conv2d(channels, dim, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (height // patch) * (width // patch), dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        hidden = widths or [4 * dim] * depth
        self.blocks = nn.Sequential(*(Block(dim, dim // HEAD_DIM, hidden[block]) for block in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.norm(self.blocks(tokens)).mean(1))
