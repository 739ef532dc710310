"""What a criterion returns, as a `Mean`: a scalar, per-sample values, a `Mean`, a `Sum`, or a dict of named ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ailab.errors import ConfigError
from ailab.types import SIZE, VIEWS, WEIGHT, Batch, Mean, Sum, batch_size, widened

_TOTAL = "loss"  # the part of a dict that is the loss; the others are then logs
_TOTALS = (
    "total",
    "total_loss",
    "loss_total",
    "sum",
)  # what people call it elsewhere: added to its own parts it would count twice


@dataclass(frozen=True)
class Result:
    """A criterion's result over a batch."""

    loss: Mean
    parts: dict[str, Mean]  # named parts, to be logged beside the loss
    returned: dict[str, Any]  # what the criterion returned, by the names of the parts

    @property
    def kind(self) -> str:
        """What the loss is: "mean"; "sum"; or "scalar", which adds up over parts of a batch only if it is the mean over samples."""
        values = [self.returned[_TOTAL]] if _TOTAL in self.returned else list(self.returned.values())
        if any(isinstance(v, Tensor) and v.dim() == 0 for v in values):
            return "scalar"
        if any(isinstance(v, Sum) for v in values):
            return "sum"
        # Parts that count other things than samples have no common weight.
        return "scalar" if len(values) > 1 and any(isinstance(v, Mean) for v in values) else "mean"


def as_mean(value: Any, batch: Batch, share: Tensor | None = None) -> Mean:
    """What a criterion returned as a `Mean`: a `Mean`, a `Sum`, per-sample losses (B,), or a scalar mean over the samples.

    Args:
        value: what it returned.
        batch: what it was given, with the weights of the samples.
        share: how often a value that the weights did not reach counts.

    Raises:
        ConfigError: for anything else. Shapes are static, so this is found on the first, shrunk step of a run.
    """
    size = batch_size(batch)
    if isinstance(value, Sum):
        return _of_sum(value, batch, share)
    if isinstance(value, Tensor) and value.shape == (size,) and value.dim() > 0:
        return Mean.of(value, batch.get(WEIGHT))
    if isinstance(value, Mean):
        mean = Mean(widened(value.total), widened(value.weight))
        return mean if share is None else _shared(mean, share)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"cfg.loss: the criterion returned {type(value).__name__}; return a tensor, a Mean, a Sum, or a dict of them."
        )
    if value.dim() == 0:
        value = widened(value)
        mean = Mean(value * size, torch.full_like(value, float(size)).detach())
        return mean if share is None else _shared(mean, share)
    raise ConfigError(
        f"cfg.loss: the criterion returned a tensor of shape {tuple(value.shape)}, which is not a scalar.\n"
        f"  Return a scalar, one loss per sample ({size},), or ailab.Mean(total, weight)."
    )


def _of_sum(value: Sum, batch: Batch, share: Tensor | None) -> Mean:
    """A sum over the global batch, as a mean that adds up: total `sum * N` and weight `n`, for `n` of its `N` samples."""
    values, weight = widened(value.values), batch.get(WEIGHT)
    if values.dim():
        mean = Mean.of(values, weight)
    else:
        mean = Mean(values, torch.full_like(values, float(batch_size(batch))).detach())
        mean = mean if share is None else _shared(mean, share)
    return Mean(mean.total * batch.get(SIZE, mean.weight).to(mean.total.dtype), mean.weight)


def _shared(mean: Mean, share: Tensor) -> Mean:
    if share.dim():
        raise ConfigError(
            "cfg.loss: a hook weighs each sample on its own, and the criterion gives one number for all of them.\n"
            "  Let it return one loss per sample (B,), or a Mean that obeys its argument `weight`."
        )
    return Mean(mean.total * share, mean.weight * share)


def result_of(ask: Callable[[Batch], Any], batch: Batch, obeys: bool) -> Result:
    """The loss of a batch and its named parts.

    Args:
        ask: the criterion over the fields of a batch.
        batch: with the field VIEWS where a hook has put it: [(share, fields)]. The criterion is then asked once for each, with
            these fields in place of the batch's; each sample counts `share` times, and the results add up.
        obeys: whether the criterion is given the weights, so that a `Mean` of it has counted them.

    Raises:
        ConfigError: for a result that is no loss.
    """
    if VIEWS not in batch:
        result = ask(batch)
        if isinstance(result, (Tensor, Mean, Sum)):
            return Result(as_mean(result, batch), {}, {"": result})
        named, factors = _named(result)
        return _combined({n: as_mean(v, batch) for n, v in named.items()}, factors, named, batch)
    found: dict[str, Mean] = {}
    named: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    for share, fields in batch[VIEWS]:
        view = {**batch, **fields}
        if share is not None:
            view[WEIGHT] = share * (batch[WEIGHT] if WEIGHT in batch else torch.ones(batch_size(batch), device=share.device))
        named, factors = _named(ask(view))
        for name, value in named.items():
            mean = as_mean(value, view, None if isinstance(value, Mean) and obeys else share)
            sums = found[name] + mean if name in found else mean
            # The shares of a sample add up to 1; so do they here, without rounding.
            found[name] = sums if isinstance(value, Mean) else Mean(sums.total, as_mean(value, batch).weight)
    return _combined(found, factors, named, batch)


def _named(result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A criterion's result by the names of its parts, "" where it is one; and the factors of parts given as (factor, value)."""
    if not isinstance(result, Mapping):
        return {"": result}, {}
    parts = {str(n): v for n, v in cast("Mapping[Any, Any]", result).items()}
    if not parts:
        raise ConfigError("cfg.loss: the criterion returned an empty dict; return a loss, or named parts of one.")
    if _TOTAL not in parts and (same := [n for n in parts if n in _TOTALS]) and len(parts) > 1:
        raise ConfigError(
            f"cfg.loss: the criterion returned parts named {', '.join(parts)}. Parts are added up, and {same[0]!r} looks like\n"
            f"  their total. Call it 'loss': then it is the loss, and the others are logged. Or leave it out."
        )
    pairs = {n: cast("tuple[Any, Any]", v) for n, v in parts.items() if isinstance(v, tuple) and len(cast("Any", v)) == 2}
    return {**parts, **{n: value for n, (_, value) in pairs.items()}}, {n: factor for n, (factor, _) in pairs.items()}


def _combined(parts: dict[str, Mean], factors: Mapping[str, Any], returned: dict[str, Any], batch: Batch) -> Result:
    """The loss of named parts: the one called "loss", or the sum of all, each times its factor."""
    if "" in parts:
        return Result(parts[""], {}, returned)
    if _TOTAL in parts:
        return Result(parts[_TOTAL], {n: p for n, p in parts.items() if n != _TOTAL}, returned)
    weight = batch[WEIGHT].sum() if WEIGHT in batch else None
    scaled = {n: Mean(p.total * factors[n], p.weight) if n in factors else p for n, p in parts.items()}
    values = [p.value for p in scaled.values()]
    weight = torch.full_like(values[0], float(batch_size(batch))).detach() if weight is None else weight.to(values[0].dtype)
    total = torch.stack([v * weight for v in values]).sum()
    logs = {**parts, **{f"{n}_weighted": scaled[n] for n in factors}}
    return Result(Mean(total, weight.to(total.dtype)), logs, returned)
