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

from ailab.models import ResNet

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


PAIRS = {
    "resnet18d": Pair(lambda: ResNet(18, stem="deep", shortcut="avg"), "timm", timm("resnet18d"), images(33)),
    "resnet50d": Pair(lambda: ResNet(50, stem="deep", shortcut="avg"), "timm", timm("resnet50d"), images(32)),
    "resnet50c": Pair(lambda: ResNet(50, stem="deep"), "timm", timm("resnet50c"), images(32)),
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
