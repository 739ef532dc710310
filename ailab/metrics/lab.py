"""The interface of class-style metrics, which run on the host."""

from __future__ import annotations

from typing import Any


class LabBaseMetric:
    """A metric that gathers samples and is computed at the end of a phase; torchmetrics have the same interface.

    `update` is given the fields that `mapping` names, without padding. A metric that is a mean over samples is better a
    function that returns a `Mean`: that is traced with the step and exact over ranks.
    """

    def reset(self) -> None:
        """Forget every sample."""
        raise NotImplementedError(f"{type(self).__name__} defines no reset")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def compute(self) -> Any:
        """The value over all samples since `reset`: a number, a 0-d tensor, or a dict of them."""
        raise NotImplementedError(f"{type(self).__name__} defines no compute")

    @property
    def avg(self) -> Any:
        """`compute()`, under the name that `log_items` uses."""
        return self.compute()
