"""The interface of class-style metrics. They run on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LabBaseMetric:
    """A metric that is updated with each batch and computed at the end of a phase. torchmetrics has the same interface.

    `update` gets the fields that `mapping` names, without padding. For a metric that is a mean over samples, a function that
    returns a `Mean` is better: it is traced into the step, and exact over all ranks.
    """

    higher_is_better: bool | Mapping[str, bool] | None = None  # of a dict of results, by name; None: the cfg has to say it

    def reset(self) -> None:
        """Clear all samples."""
        raise NotImplementedError(f"{type(self).__name__} defines no reset")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add one batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def compute(self) -> Any:
        """The value over all samples since `reset`: a number, a 0-d tensor, or a dict of them."""
        raise NotImplementedError(f"{type(self).__name__} defines no compute")

    @property
    def avg(self) -> Any:
        """`compute()`, under the name that `log_items` uses."""
        return self.compute()
