"""MixupHook and CutMixHook: train on pairs of samples, mixed on the device, inside the step, from the step's own randomness."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from ailab.errors import ConfigError, nearest
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import VIEWS, WEIGHT, Aux, Batch, Buffers, Loss, Params, batch_size

Per = Literal["batch", "sample"]
Mix = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, partner's x, share) -> (mixed x, share as it came out)


@HOOKS.register_module()
def MixupHook(
    alpha: float = 0.2,
    field: str = "input",
    targets: Sequence[str] = ("target",),
    prob: float = 1.0,
    per: Per = "batch",
    name: str = "mixup",
) -> Middleware[Loss]:
    """Train on `s * x + (1 - s) * partner`, with the loss `s * loss(own targets) + (1 - s) * loss(partner's targets)`.

    The share `s` is the larger of Beta(alpha, alpha) and 1 less it (a pair drawn the other way round is the same mixture), so
    that accuracy in training is measured against the target that counts most. The model runs once; the criterion, whatever its
    targets are, is asked for both and need not take probabilities. Partners are other samples of the batch (of the
    micro-batch, of the rank), each exactly once; a padded sample is nobody's partner. Totals and weights are mixed and divided
    once, so a class-weighted loss is divided by the mixed class weights.

    Args:
        alpha: of the Beta distribution; 0 mixes nothing.
        field: the batch field that is mixed; floating point, or it becomes float32.
        targets: the batch fields that the criterion sees once as its own and once as its partner's.
        prob: the chance that a batch (or a sample) is mixed at all.
        per: one share for the whole batch, or one for each sample; "sample" needs a loss per sample.
        name: of this hook.

    Raises:
        ConfigError: for alpha < 0, prob outside [0, 1], a field that the batch lacks; on the first step when the loss comes out
            of the model, or is one number and `per` is "sample".

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """

    def mix(x: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.maximum(share, 1 - share)
        x, other = (v if v.is_floating_point() else v.float() for v in (x, other))
        return other.lerp(x, share.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) if share.dim() else share.to(x.dtype)), share

    return _mixing(mix, alpha, field, targets, prob, per, name)


@HOOKS.register_module()
def CutMixHook(
    alpha: float = 1.0,
    field: str = "input",
    targets: Sequence[str] = ("target",),
    prob: float = 1.0,
    per: Per = "batch",
    name: str = "cutmix",
) -> Middleware[Loss]:
    """Paste a box of another sample into each, and share the loss between both targets by area.

    Everything else is as in `MixupHook`. The box has the share `1 - s` of the picture, s from Beta(alpha, alpha), a uniform
    centre, and is cut off at the border; what is left of it is what counts.

    Args:
        alpha: of the Beta distribution; 0 mixes nothing.
        field: (B, C, *sizes) of any number of dimensions, or (B, L); the box spans all of them but the channels.
        targets: the batch fields that the criterion sees once as its own and once as its partner's.
        prob: the chance that a batch (or a sample) is mixed at all.
        per: one box and share for the whole batch, or one for each sample; "sample" needs a loss per sample.
        name: of this hook.

    Raises:
        ConfigError: as for MixupHook.

    Source: Yun et al. 2019, arXiv:1905.04899.
    """

    def mix(x: Tensor, other: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        sizes, lead = (x.shape[2:], 2) if x.dim() > 2 else (x.shape[1:], 1)
        half = (1 - share.view(-1, 1)) ** (1 / len(sizes)) / 2  # of the box's side, as a fraction
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for i, size in enumerate(sizes):
            at = (torch.arange(size, device=x.device) + 0.5) / size
            near = (at - torch.rand(half.shape, device=x.device)).abs() < half  # (B, size), or (1, size)
            inside = inside & near.view(-1, *[size if j == lead + i else 1 for j in range(1, x.dim())])
        left = 1 - inside.flatten(1).float().mean(1)
        return torch.where(inside, other, x), left.view(share.shape)

    return _mixing(mix, alpha, field, targets, prob, per, name)


def _mixing(mix: Mix, alpha: float, field: str, targets: Sequence[str], prob: float, per: Per, name: str) -> Middleware[Loss]:
    path = f"cfg.hooks.{name}"
    if not alpha >= 0:
        raise ConfigError(f"{path}.alpha is {alpha}; it is at least 0, where nothing is mixed.")
    if not 0 <= prob <= 1:
        raise ConfigError(f"{path}.prob is {prob}; a probability lies in [0, 1].")
    if per not in ("batch", "sample"):
        raise ConfigError(f"{path}.per is {per!r}; there is one share per 'batch' or per 'sample'.")

    def wrap(loss: Loss) -> Loss:
        if alpha == 0 or prob == 0:
            return loss

        def mixed(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            x, size = batch[field], batch_size(batch)
            if x.dim() < 2:
                raise ConfigError(f"{path}.field: '{field}' is of shape {tuple(x.shape)}; there is nothing to mix in a sample.")
            with torch.no_grad():
                share, partner = draw_share(alpha, prob, size if per == "sample" else None, x.device), draw_partner(batch)
                x, share = mix(x, x[partner], share)
            return loss(params, buffers, {**batch, field: x, VIEWS: _paired(batch, share, partner, targets)})

        return mixed

    return Middleware(name, wrap, "loss", check=_checker((field, *targets), path))


def draw_share(alpha: float, prob: float, size: int | None, device: torch.device) -> Tensor:
    """Beta(alpha, alpha) with probability `prob`, else 1, float32: (size,), or () for None."""
    shape = () if size is None else (size,)
    # A ratio of Gamma variables, in float64 and away from 0: of a small alpha both of them may underflow.
    gamma = torch._standard_gamma(torch.full((2, *shape), alpha, dtype=torch.float64, device=device)).clamp(min=1e-300)
    share = (gamma[0] / gamma.sum(0)).float()
    return share if prob == 1 else torch.where(torch.rand(shape, device=device) < prob, share, 1.0)


def draw_partner(batch: Batch) -> Tensor:
    """For each sample another one of the batch, (B,) int64: one random cycle over those that count; the others are their own."""
    size, weight = batch_size(batch), batch.get(WEIGHT)
    device = next(v.device for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0)
    key = torch.rand(size, device=device)
    rank = torch.arange(size, device=device)
    if weight is None:
        order, follower = key.argsort(), (rank + 1) % size
    else:
        order, count = (key + 2.0 * (weight == 0)).argsort(), (weight != 0).sum()
        follower = torch.where(rank < count, (rank + 1) % count.clamp(min=1), rank)
    return torch.empty_like(order).scatter(0, order, order[follower])


def _paired(batch: Batch, share: Tensor, partner: Tensor, targets: Sequence[str]) -> list[tuple[Tensor, Batch]]:
    """Each view of the batch twice: with its own targets, and with those of the partners."""
    views: list[tuple[Tensor, Batch]] = []
    for times, fields in batch.get(VIEWS) or [(None, {})]:
        theirs = {t: fields.get(t, batch[t])[partner] for t in targets}
        others = times[partner] if times is not None and times.dim() else times
        views.append((share if times is None else share * times, fields))
        views.append((1 - share if others is None else (1 - share) * others, {**fields, **theirs}))
    return views


def _checker(wanted: Sequence[str], path: str) -> Callable[[Collection[str], str], list[str]]:
    def check(fields: Collection[str], phase: str) -> list[str]:
        return [
            f"{path}: there is no field '{f}'.{nearest(f, fields)} Fields: {', '.join(fields)}."
            for f in wanted
            if f not in fields
        ]

    return check
