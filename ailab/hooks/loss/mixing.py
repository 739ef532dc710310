"""MixupHook and CutMixHook: mix pairs of samples on the device, inside the step, with the random numbers of the step."""

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
Mix = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, partner's x, lambda) -> (mixed x, lambda as applied)


@HOOKS.register_module()
def MixupHook(
    alpha: float = 0.2,
    field: str = "input",
    targets: Sequence[str] = ("target",),
    prob: float = 1.0,
    per: Per = "batch",
    name: str = "mixup",
) -> Middleware[Loss]:
    """Mixup: train on `m * x + (1 - m) * partner`, with the loss `m * loss(own targets) + (1 - m) * loss(partner's targets)`.

    `m` (lambda in the paper) is the larger of b and 1 - b, with b from Beta(alpha, alpha). The mixtures are the same as for `b`,
    and training accuracy is measured against the target with the larger weight. The model runs once. The criterion is computed
    for both targets, so it need not take probabilities. The partner is another sample of the same batch (micro-batch, rank).
    Each sample is the partner of exactly one other sample. Padded samples are not used as partners. Totals and weights are mixed
    and divided once. So a class-weighted loss is divided by the mixed class weights.

    Args:
        alpha: parameter of the Beta distribution, at least 0. 0 mixes nothing.
        field: the batch field that is mixed. If it is not floating point it becomes float32.
        targets: the batch fields that are taken once from the sample and once from its partner.
        prob: probability that a batch (or a sample) is mixed, in [0, 1].
        per: draw one `m` for the whole batch, or one for each sample. "sample" needs a loss per sample.

    Raises:
        ConfigError: for alpha < 0, prob outside [0, 1], or a field that the batch does not have. On the first step: when the
            model computes its own loss, or when `per` is "sample" and the loss is one number for the batch.

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """

    def mix(x: Tensor, other: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        lam = torch.maximum(lam, 1 - lam)
        x, other = (v if v.is_floating_point() else v.float() for v in (x, other))
        return other.lerp(x, lam.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) if lam.dim() else lam.to(x.dtype)), lam

    return _mixing_hook(mix, alpha, field, targets, prob, per, name)


@HOOKS.register_module()
def CutMixHook(
    alpha: float = 1.0,
    field: str = "input",
    targets: Sequence[str] = ("target",),
    prob: float = 1.0,
    per: Per = "batch",
    name: str = "cutmix",
) -> Middleware[Loss]:
    """CutMix: paste a box of another sample into each sample, and weight the losses of both targets by area.

    The box has a uniform random centre and the area `1 - b` of the image, with b from Beta(alpha, alpha). It is clipped at the
    border. `m` is the area outside the clipped box. The loss is `m * loss(own targets) + (1 - m) * loss(partner's targets)`.
    Partners and losses are as in `MixupHook`.

    Args:
        alpha: parameter of the Beta distribution, at least 0. 0 mixes nothing.
        field: the batch field that is mixed, (B, C, *sizes) with any number of sizes, or (B, L). The box covers all channels.
        targets: the batch fields that are taken once from the sample and once from its partner.
        prob: probability that a batch (or a sample) is mixed, in [0, 1].
        per: draw one box for the whole batch, or one for each sample. "sample" needs a loss per sample.

    Raises:
        ConfigError: as for `MixupHook`.

    Source: Yun et al. 2019, arXiv:1905.04899.
    """

    def mix(x: Tensor, other: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        sizes, lead = (x.shape[2:], 2) if x.dim() > 2 else (x.shape[1:], 1)
        half = (1 - lam.view(-1, 1)) ** (1 / len(sizes)) / 2  # of the box's side, as a fraction
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for i, size in enumerate(sizes):
            at = (torch.arange(size, device=x.device) + 0.5) / size
            near = (at - torch.rand(half.shape, device=x.device)).abs() < half  # (B, size), or (1, size)
            inside = inside & near.view(-1, *[size if j == lead + i else 1 for j in range(1, x.dim())])
        left = 1 - inside.flatten(1).float().mean(1)
        return torch.where(inside, other, x), left.view(lam.shape)

    return _mixing_hook(mix, alpha, field, targets, prob, per, name)


def _mixing_hook(
    mix: Mix, alpha: float, field: str, targets: Sequence[str], prob: float, per: Per, name: str
) -> Middleware[Loss]:
    path = f"cfg.hooks.{name}"
    if not alpha >= 0:
        raise ConfigError(f"{path}.alpha is {alpha}; it must be at least 0 (0 mixes nothing).")
    if not 0 <= prob <= 1:
        raise ConfigError(f"{path}.prob is {prob}; a probability must be in [0, 1].")
    if per not in ("batch", "sample"):
        raise ConfigError(f"{path}.per is {per!r}; it must be 'batch' or 'sample'.")

    def wrap(loss: Loss) -> Loss:
        if alpha == 0 or prob == 0:
            return loss

        def mixed(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            x, size = batch[field], batch_size(batch)
            if x.dim() < 2:
                raise ConfigError(
                    f"{path}.field: '{field}' is of shape {tuple(x.shape)}; there is nothing to mix below 2 dimensions."
                )
            with torch.no_grad():
                lam, partner = draw_lambda(alpha, prob, size if per == "sample" else None, x.device), draw_partner(batch)
                x, lam = mix(x, x[partner], lam)
            return loss(params, buffers, {**batch, field: x, VIEWS: _mixed_views(batch, lam, partner, targets)})

        return mixed

    return Middleware(name, wrap, "loss", check=_field_check((field, *targets), path))


def draw_lambda(alpha: float, prob: float, size: int | None, device: torch.device) -> Tensor:
    """Mixing coefficients from Beta(alpha, alpha) with probability `prob`, else 1; float32, (size,), or () if `size` is None."""
    shape = () if size is None else (size,)
    # A ratio of Gamma variables, in float64 and clamped: with a small alpha both may underflow to 0.
    gamma = torch._standard_gamma(torch.full((2, *shape), alpha, dtype=torch.float64, device=device)).clamp(min=1e-300)
    lam = (gamma[0] / gamma.sum(0)).float()
    return lam if prob == 1 else torch.where(torch.rand(shape, device=device) < prob, lam, 1.0)


def draw_partner(batch: Batch) -> Tensor:
    """The partner of each sample, (B,) int64: one random cycle over the samples that count. Padding is its own partner."""
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


def _mixed_views(batch: Batch, lam: Tensor, partner: Tensor, targets: Sequence[str]) -> list[tuple[Tensor, Batch]]:
    """Each view of the batch twice: with its own targets and with the partners' targets."""
    views: list[tuple[Tensor, Batch]] = []
    for weight, fields in batch.get(VIEWS) or [(None, {})]:
        partner_targets = {t: fields.get(t, batch[t])[partner] for t in targets}
        partner_weight = weight[partner] if weight is not None and weight.dim() else weight
        views.append((lam if weight is None else lam * weight, fields))
        views.append((1 - lam if partner_weight is None else (1 - lam) * partner_weight, {**fields, **partner_targets}))
    return views


def _field_check(wanted: Sequence[str], path: str) -> Callable[[Collection[str], str], list[str]]:
    def check(fields: Collection[str], phase: str) -> list[str]:
        return [
            f"{path}: there is no field '{f}'.{nearest(f, fields)} Fields: {', '.join(fields)}."
            for f in wanted
            if f not in fields
        ]

    return check
