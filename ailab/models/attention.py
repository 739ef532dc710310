"""Transformer blocks: attention with rotary positions, perceptron, layer scale, stochastic depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ailab.errors import ConfigError
from ailab.models.positions import rotated

Norm = Callable[[int], nn.Module]  # features -> a norm over the last dimension


def check_heads(owner: str, width: int, heads: int, multiple: int = 1) -> None:
    """Raise a ConfigError where the width is not `heads` times a multiple of `multiple`: what rotary positions need."""
    if width % heads or (width // heads) % multiple:
        what = f"a multiple of heads={heads}" + (f" times {multiple}, for rotary positions" if multiple > 1 else "")
        raise ConfigError(f"{owner}.width: {width} is not {what}.")


class Attention(nn.Module):
    """Self-attention: Vaswani et al., "Attention is all you need", 2017. torch chooses the kernel.

    Args:
        width: features of a token; a multiple of `heads`.
        heads: number of heads.
        bias: whether queries, keys and values have a bias.
        qk_norm: the norm of each head's queries and keys (Henry et al. 2020); None for none.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True, qk_norm: Norm | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.Identity() if qk_norm is None else qk_norm(width // heads)
        self.k_norm = nn.Identity() if qk_norm is None else qk_norm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """(B, T, width) -> (B, T, width).

        Args:
            x: the tokens.
            angles: of rotary positions, broadcast to (B, heads, T, width / heads / 2); None for none.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, features)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast a norm gives float32
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Two linear layers with GELU between them: (..., width) -> (..., hidden) -> (..., width)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Each feature times a learned number, `init` at first: Touvron et al., "Going deeper with image transformers", 2021."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return x * self.gamma


class DropPath(nn.Module):
    """In training the whole of a sample is 0 with probability `rate`, else divided by `1 - rate`: Huang et al. 2016."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        kept = torch.bernoulli(torch.full((x.shape[0], *[1] * (x.dim() - 1)), keep, device=x.device))
        return x * (kept / keep).to(x.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each on a normalised input and added to it (pre-norm).

    Args:
        attention: the one.
        perceptron: the other.
        norm: of their inputs.
        width: features of a token.
        layer_scale: first value of LayerScale on both; None for none.
        drop_path: probability of dropping either, for a sample.
    """

    def __init__(
        self,
        attention: Attention,
        perceptron: Perceptron,
        norm: Norm,
        width: int,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.attn = norm(width), attention
        self.norm2, self.mlp = norm(width), perceptron
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), angles)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
