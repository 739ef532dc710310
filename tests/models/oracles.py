"""The same network in ailab and in another library: one table, and the logits of the others, stored.

python tests/models/oracles.py     writes logits.json; needs the libraries
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ailab.models import ResNet, ViT

STORED = Path(__file__).with_name("logits.json")
Tensors = dict[str, Tensor]


def same(state: Tensors) -> Tensors:
    return state


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return made


@dataclass(frozen=True)
class Pair:
    ours: Callable[[], nn.Module]
    library: str
    theirs: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    renamed: Callable[[Tensors], Tensors] = same  # our tensors under the names of the other library
    logits: Callable[[nn.Module, Tensor], Tensor] = lambda model, input: model(input)
    tolerance: float = 1e-5  # of the largest logit


def images(size: int) -> Callable[[], Tensor]:
    return lambda: waves(2 * 3 * size * size, 1).reshape(2, 3, size, size)


def of_vit(state: Tensors) -> Tensors:
    return {n.replace("patch_embed.", "patch_embed.proj."): t for n, t in state.items()}


def of_mean_vit(state: Tensors) -> Tensors:
    return {f"fc_{n}" if n.startswith("norm.") else n: t for n, t in of_vit(state).items()}


def of_dinov3(state: Tensors) -> Tensors:
    return {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in of_vit(state).items()}


SMALL = dict(image_size=48, width=64, depth=3, heads=4, num_classes=10)
small = dict(img_size=48, embed_dim=64, depth=3, num_heads=4, num_classes=10)
PAIRS = {
    "resnet18d": Pair(lambda: ResNet(18, stem="deep", shortcut="avg"), "timm", timm("resnet18d"), images(33)),
    "resnet50d": Pair(lambda: ResNet(50, stem="deep", shortcut="avg"), "timm", timm("resnet50d"), images(32)),
    "resnet50c": Pair(lambda: ResNet(50, stem="deep"), "timm", timm("resnet50c"), images(32)),
    "ViT": Pair(lambda: ViT("Ti", image_size=32), "timm", timm("vit_tiny_patch16_224", img_size=32), images(32), of_vit),
    "ViT DINOv2": Pair(
        lambda: ViT(**{**SMALL, "image_size": 42}, patch=14, layer_scale=1e-5, registers=4),
        "timm",
        timm("vit_small_patch14_reg4_dinov2", **{**small, "img_size": 42}),
        images(42),
        of_vit,
    ),
    "ViT mean": Pair(
        lambda: ViT(**SMALL, mlp_ratio=5, layer_scale=1e-5, registers=1, pool="mean"),
        "timm",
        timm("vit_wee_patch16_reg1_gap_256", **small),
        images(48),
        of_mean_vit,
    ),
    "ViT attention pooling": Pair(
        lambda: ViT(**SMALL, pool="map"), "timm", timm("vit_base_patch16_siglip_224", **small), images(48), of_vit
    ),
    "ViT DINOv3": Pair(
        lambda: ViT(**SMALL, pos="rope", layer_scale=1e-5, registers=4, qkv_bias=False, eps=1e-5),
        "timm",
        timm("vit_small_patch16_dinov3", global_pool="token", **small),
        images(48),
        of_dinov3,
    ),
    "ViT qk-norm": Pair(
        lambda: ViT(**SMALL, qk_norm=True), "timm", timm("vit_tiny_patch16_224", qk_norm=True, **small), images(48), of_vit
    ),
}


def waves(count: int, seed: int) -> Tensor:
    """Numbers in [-1, 1) that look random and are the same everywhere: no generator of a library makes them."""
    n = torch.arange(count, dtype=torch.int64)
    n = (n * 1103515245 + 12345 + seed * 7919) & 0x7FFFFFFF
    n = ((n ^ (n >> 15)) * 1103515245 + 12345) & 0x7FFFFFFF
    return (n.double() / 2**30 - 1).float()


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """`model`, in evaluation mode, with weights by name and place: matrices keep the size of what they are given."""
    for i, (name, t) in enumerate(sorted(model.state_dict().items())):
        if not t.is_floating_point():
            continue
        values = waves(t.numel(), i).reshape(t.shape).to(t.dtype)
        if t.dim() >= 2:
            t.copy_(values * (3 / t[0].numel()) ** 0.5)
        else:
            t.copy_(1 + 0.2 * values if name.endswith(("weight", "gamma", "var", "scale")) else 0.1 * values)
    return model.eval()


def our_logits(pair: Pair) -> Tensor:
    with torch.no_grad():
        return filled(pair.ours())(pair.input())


def their_logits(pair: Pair) -> Tensor:
    other = pair.theirs().eval()
    missing, unexpected = other.load_state_dict(pair.renamed(filled(pair.ours()).state_dict()), strict=False)
    assert not unexpected and all(n.endswith((".attn.bias", ".attn.masked_bias")) for n in missing), (missing, unexpected)
    with torch.no_grad():
        return pair.logits(other, pair.input())


def some(logits: Tensor) -> list[float]:
    """Sixteen of the logits, from the first to the last."""
    flat = logits.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 16).long()].tolist()


if __name__ == "__main__":
    found = {name: [round(v, 8) for v in some(their_logits(pair))] for name, pair in PAIRS.items()}
    rows = ",\n".join(f"  {json.dumps(name)}: {values}" for name, values in found.items())
    STORED.write_text("{\n" + rows + "\n}\n")
    for name, pair in PAIRS.items():
        ours, theirs = our_logits(pair), their_logits(pair)
        print(f"{name}: difference {float((ours - theirs).abs().max()):.1e} of {float(theirs.abs().max()):.3f}")
