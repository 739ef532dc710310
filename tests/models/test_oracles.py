"""The models equal those of other libraries with the same weights: live where the library is there, else by stored logits."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
import torchvision
from models.oracles import PAIRS, STORED, Pair, filled, images, our_logits, some, their_logits
from torch import Tensor

from ailab.models import ResNet
from ailab.models.positions import grid_sincos


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_the_stored_ones_of_the_other_library(name: str) -> None:
    """With weights that a formula gives, our logits are those that the other library gave."""
    stored = torch.tensor(json.loads(STORED.read_text())[name])
    assert float(stored.std()) > 0.01 * float(stored.abs().max()), "logits that are all alike would prove nothing"
    assert close(torch.tensor(some(our_logits(PAIRS[name]))), stored, 10 * PAIRS[name].tolerance)  # on another CPU


@pytest.mark.nightly
@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_the_other_library(name: str) -> None:
    """All logits, side by side, where the library is installed."""
    pair: Pair = PAIRS[name]
    if importlib.util.find_spec(pair.library) is None:
        pytest.skip(f"{pair.library} is the oracle and is not installed: pip install {pair.library}")
    assert close(our_logits(pair), their_logits(pair), pair.tolerance)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_equals_torchvisions(depth: int) -> None:
    """The state_dict of torchvision loads as it is, and the logits are the same."""
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    ours = filled(ResNet(depth))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert close(ours(images(40)()), theirs.eval()(images(40)()), 1e-5)


def test_sine_cosine_positions_by_hand() -> None:
    """Row 1, column 2 of a grid of 2x3: sines and cosines of 2, then of 1, at the rates 1 and 1/100."""
    wanted = [f(place * rate) for place in (2, 1) for f in (math.sin, math.cos) for rate in (1, 0.01)]
    assert grid_sincos(2, 3, 8)[5].tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.nightly
def test_sine_cosine_positions_are_those_of_transformers() -> None:
    """Its table with the halves exchanged, as its masked autoencoder has it; where the library is installed."""
    pytest.importorskip("transformers", reason="transformers is the oracle: pip install transformers")
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    table = build_2d_sinusoidal_position_embedding(height=4, width=5, embed_dim=64)
    theirs = torch.cat([table[..., 32:], table[..., :32]], -1)
    torch.testing.assert_close(grid_sincos(4, 5, 64), theirs, rtol=0, atol=1e-6)
