"""The bootstrap interval of a mean, from what each sample adds to its total and to its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ailab.rng import mix


def bootstrap_intervals(rows: Tensor, seed: int, *, resamples: int = 1000, level: float = 0.95) -> list[tuple[float, float]]:
    """The percentile bootstrap interval of each mean `sum(totals) / sum(weights)`.

    Samples are drawn with replacement, as many as there are. The mean is computed from each draw. The interval is between two
    quantiles of these means, with linear interpolation.

    Args:
        rows: (N, M, 2) float64 on the CPU: what each of N samples adds to the total and to the weight of M means.
        seed: of the draws. The same rows and seed give the same interval.
        resamples: number of draws, at least 1.
        level: share of the means inside the interval, in (0, 1).

    Returns:
        M pairs (low, high).

    Source: Efron 1979; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    size, count = rows.shape[0], rows.shape[1]
    flat = rows.reshape(size, 2 * count)
    generator = torch.Generator().manual_seed(mix(seed, size, resamples))
    means = torch.empty(resamples, count, dtype=torch.float64)
    for i in range(resamples):
        drawn = torch.randint(size, (size,), generator=generator)
        times = torch.bincount(drawn, minlength=size).to(torch.float64)
        sums = (times @ flat).view(count, 2)
        means[i] = sums[:, 0] / (sums[:, 1] + (sums[:, 1] == 0))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, tails, dim=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
