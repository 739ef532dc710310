"""Vision transformers: patches of an image as tokens."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ailab.errors import ConfigError
from ailab.models.attention import Attention, Block, Perceptron, check_heads
from ailab.models.images import Images, Pixels
from ailab.models.positions import grid_angles, grid_sincos
from ailab.registry import MODELS

SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, depth, heads


class AttentionPool(nn.Module):
    """Multi-head attention pooling: a learned query sees all tokens, and a perceptron follows. (B, T, width) -> (B, width).

    Source: Zhai et al., "Scaling vision transformers", 2022; Lee et al., "Set transformer", 2019.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width).normal_(std=width**-0.5))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=eps), Perceptron(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (y + self.mlp(self.norm(y)))[:, 0]


@MODELS.register_module()
class ViT(nn.Module):
    """Patches of an image, with positions, through transformer blocks; pooling and a linear layer.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021. Ti: Touvron et al. 2021 (DeiT). Registers: Darcet et
    al., "Vision transformers need registers", 2024. Mean pooling and sine-cosine positions: Beyer et al. 2022.

    Args:
        size: "Ti", "S", "B" or "L": sets width, depth and heads where they are not given.
        image_size: height and width of an image in pixels; one number for both. A multiple of `patch`.
        patch: height and width of a patch, in pixels.
        num_classes: number of classes: logits per image.
        in_channels: channels of an image, C.
        width: features of a token.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden features of a perceptron, as a multiple of `width`.
        pool: "token", the output of a class token; "mean" over the patches, before the last norm; "map", attention pooling.
        pos: "learned", "sincos" (fixed) or "rope" (queries and keys of the patches are rotated).
        registers: number of further tokens that are thrown away at the end. With them the class token has no position of its
            own: that would be a second parameter for the same sum.
        layer_scale: first value of the factor of each block's feature, as 1e-5; None for none.
        drop_path: probability of dropping the last block, for a sample; it grows linearly from 0 at the first one.
        patch_dropout: share of the patches that training leaves out, others for each sample (Liu et al. 2023).
        dropout: probability of dropping a feature before the linear layer.
        qk_norm: normalise queries and keys of each head.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of the layer norms.
        mean: subtracted from the input. One value per channel or one for all, in the units of the input (0..255 for uint8).
        std: divides the input after `mean` is subtracted. One value per channel or one for all, in the same units.

    Raises:
        ConfigError: a name is none of these, a rate is not in [0, 1), a size is no multiple of `patch`, or a width does not fit
            heads or positions.
    """

    angles: Tensor | None  # (1, 1, T, width / heads / 2): zero, which is no rotation, for tokens that are no patches

    def __init__(
        self,
        size: Literal["Ti", "S", "B", "L"] = "B",
        image_size: int | tuple[int, int] = 224,
        patch: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        pool: Literal["token", "mean", "map"] = "token",
        pos: Literal["learned", "sincos", "rope"] = "learned",
        registers: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        patch_dropout: float = 0.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        mean: Pixels = 0.0,
        std: Pixels = 1.0,
    ):
        super().__init__()
        _check_names(size, pool, pos)
        _check_rates(patch_dropout=patch_dropout, drop_path=drop_path)
        usual = SIZES[size]
        width, depth, heads = width or usual[0], depth or usual[1], heads or usual[2]
        check_heads("ViT", width, heads, 4 if pos == "rope" else 1)
        if pos == "sincos" and width % 4:
            raise ConfigError(f"ViT.width: {width} is no multiple of 4, which sine-cosine positions need.")
        rows, columns = grid_of("ViT", image_size, patch)
        self.pool, self.pos, self.patch_dropout, self.num_features = pool, pos, patch_dropout, width
        self.images = Images("ViT", in_channels, mean, std, exact=(rows * patch, columns * patch))
        self.patch_embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "token" else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, width).normal_(std=1e-6)) if registers else None
        self.prefix = (pool == "token") + registers  # tokens before the patches
        self._add_positions(rows, columns, width, heads)
        norm = partial(nn.LayerNorm, eps=eps)
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(
                Attention(width, heads, bias=qkv_bias, qk_norm=norm if qk_norm else None),
                Perceptron(width, hidden),
                norm,
                width,
                layer_scale,
                drop_path * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.norm = norm(width)
        self.attn_pool = AttentionPool(width, heads, hidden, eps) if pool == "map" else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)
        self._init_weights()

    def _add_positions(self, rows: int, columns: int, width: int, heads: int) -> None:
        own = int(self.cls_token is not None and self.reg_token is None)  # whether the class token has a position
        if self.pos == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, own + rows * columns, width).normal_(std=0.02))
        elif self.pos == "sincos":
            table = grid_sincos(rows, columns, width)
            self.register_buffer("pos_embed", torch.cat([torch.zeros(own, width), table])[None], persistent=False)
        angles = None
        if self.pos == "rope":
            found = grid_angles(rows, columns, width // heads)
            angles = torch.cat([torch.zeros(self.prefix, found.shape[1]), found])[None, None]
        self.register_buffer("angles", angles, persistent=False)

    def _init_weights(self) -> None:
        """Truncated normal of 0.02 for linear layers, as in DeiT; the head begins with zeros, as in the paper."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def tokens(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, width): class token, registers, patches, after the last block and before the last norm."""
        x = self.patch_embed(self.images(input)).flatten(2).transpose(1, 2)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.pos == "rope":
            x = torch.cat([*prefix, x], 1)
        elif self.pos_embed.shape[1] == x.shape[1]:
            x = torch.cat([*prefix, x + self.pos_embed], 1)
        else:
            x = torch.cat([*prefix, x], 1) + self.pos_embed
        angles = self.angles
        if self.training and self.patch_dropout:
            x, angles = self._thinned(x)
        for block in self.blocks:
            x = block(x, angles)
        return x

    def _thinned(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Some of the patches, others for each sample, and their angles (B, 1, T, features)."""
        patches = x.shape[1] - self.prefix
        keep = max(1, round(patches * (1 - self.patch_dropout)))
        chosen = torch.rand(len(x), patches, device=x.device).argsort(1)[:, :keep].sort(1).values + self.prefix
        chosen = torch.cat([torch.arange(self.prefix, device=x.device).expand(len(x), -1), chosen], 1)
        angles = None if self.angles is None else self.angles[0, 0][chosen][:, None]
        return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])), angles

    def features(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width): what the linear layer sees."""
        x = self.tokens(input)
        if self.attn_pool is not None:
            return self.attn_pool(self.norm(x))
        return self.norm(x[:, 0] if self.pool == "token" else x[:, self.prefix :].mean(1))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> (B, num_classes) logits."""
        return self.head(self.dropout(self.features(input)))


def grid_of(owner: str, image_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises a ConfigError where they do not fill the image."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch < 1 or min(height, width) < patch or height % patch or width % patch:
        raise ConfigError(f"{owner}.image_size: {height}x{width} is no multiple of the patch of {patch}x{patch} pixels.")
    return height // patch, width // patch


def _check_names(size: str, pool: str, pos: str) -> None:
    for name, given, offered in (
        ("size", size, tuple(SIZES)),
        ("pool", pool, ("token", "mean", "map")),
        ("pos", pos, ("learned", "sincos", "rope")),
    ):
        if given not in offered:
            raise ConfigError(f"ViT.{name}: {given!r} is none of {', '.join(map(repr, offered))}.")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ConfigError(f"ViT.{name}: {rate} is not in [0, 1).")
