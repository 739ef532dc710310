"""Which of two values is better: asked here for what is kept, when a run ends, when a rate falls, and what a summary calls best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, cast

from ailab.errors import ConfigError
from ailab.types import Direction

_LOSSES = ("train_loss", "val_loss", "test_loss")  # in every run


def direction_of(name: str, losses: Collection[str], metrics: Mapping[str, Any]) -> Direction | None:
    """Which direction is better for a result; None where nobody says.

    A loss and its parts go down. A metric says it itself, by the attribute `higher_is_better`: a bool, or a bool by the name of
    each of its results. torchmetrics have it.

    Args:
        name: of a result without its phase, such as "top1".
        losses: names of the loss and its parts.
        metrics: by the name in the cfg; the results of one that returns a dict are "<name>_<key>".
    """
    if name in losses:
        return "min"
    for key, metric in sorted(metrics.items(), key=lambda item: -len(item[0])):
        if name == key or name.startswith(f"{key}_"):
            higher = _higher(metric, name.removeprefix(key).removeprefix("_"))
            return None if higher is None else "max" if higher else "min"
    return None


def _higher(metric: Any, part: str) -> bool | None:
    said = getattr(metric, "higher_is_better", None)
    if said is None and hasattr(metric, "func"):  # functools.partial
        said = getattr(metric.func, "higher_is_better", None)
    if said is None and part and hasattr(metric, "keys") and part in metric.keys():  # noqa: SIM118 # a torchmetrics collection
        said = getattr(metric[part], "higher_is_better", None)
    if isinstance(said, Mapping):
        said = cast("Mapping[str, Any]", said).get(part)
    return said if isinstance(said, bool) else None


def known(mode: Direction | None, result: str, directions: Mapping[str, Direction], path: str) -> Direction:
    """`mode` where the cfg has one, else the direction of the result.

    Raises:
        ConfigError: where nobody says which is better; asks for the mode.
    """
    found = mode or directions.get(result) or ("min" if result in _LOSSES else None)
    if found is None:
        raise ConfigError(
            f"{path}: whether a lower or a higher {result!r} is better is not known: write mode='min' or mode='max'.\n"
            "  A metric can say it for good, by an attribute: higher_is_better = True."
        )
    return found


def is_better(value: float, best: float, direction: Direction, by: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than `by`; a NaN never is, and anything is better than a NaN."""
    if math.isnan(value) or math.isnan(best):
        return math.isnan(best) and not math.isnan(value)
    return (value - best if direction == "max" else best - value) > by
