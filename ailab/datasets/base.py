"""A dataset is a storage (index -> raw record) composed with a task (raw record -> sample)."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class LabBaseDataset(Dataset[Any]):
    """The base of storages and of tasks; a class that inherits one of each is a dataset.

    A storage overrides `_len` and `_get_raw`, a task `_get_sample`. Both derive from this class, so they compose in any order:

        class Leaves(TableAnnotationDataset, RegressionTask):
            def load_input(self, raw): ...
            def load_target(self, raw): ...

    An exception means a bad sample. It is not caught here: the stream puts another in its place, keeps the order and lists it.
    """

    def __len__(self) -> int:
        return self._len()

    def __getitem__(self, index: int) -> Any:
        return self._get_sample(self._get_raw(index))

    def _len(self) -> int:
        """Number of samples."""
        raise NotImplementedError(f"{type(self).__name__} inherits no storage; define _len.")

    def _get_raw(self, index: int) -> Any:
        """What is stored about one sample: a path, a row, a record."""
        raise NotImplementedError(f"{type(self).__name__} inherits no storage; define _get_raw.")

    def _get_sample(self, raw: Any) -> Any:
        """The sample, a tuple or a dict of fields."""
        raise NotImplementedError(f"{type(self).__name__} inherits no task; define _get_sample.")
