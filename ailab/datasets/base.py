"""The base class of datasets. A dataset is a storage (index -> raw record) and a task (raw record -> sample)."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class LabBaseDataset(Dataset[Any]):
    """The base class of storages and tasks. A class that inherits one storage and one task is a dataset.

    A storage overrides `_len` and `_get_raw`. A task overrides `_get_sample`. The order of the two does not matter:

        class Leaves(TableAnnotationDataset, RegressionTask):
            def load_input(self, raw): ...
            def load_target(self, raw): ...

    An exception in `__getitem__` marks a bad sample. `Stream` catches it, replaces the sample within its batch and reports it.
    """

    def __len__(self) -> int:
        return self._len()

    def __getitem__(self, index: int) -> Any:
        return self._get_sample(self._get_raw(index))

    def _len(self) -> int:
        """Number of samples."""
        raise NotImplementedError(f"{type(self).__name__} inherits no storage; define _len.")

    def _get_raw(self, index: int) -> Any:
        """The raw record of one sample: a path, a row, a dict."""
        raise NotImplementedError(f"{type(self).__name__} inherits no storage; define _get_raw.")

    def _get_sample(self, raw: Any) -> Any:
        """The sample of a raw record: a tuple or a dict of fields."""
        raise NotImplementedError(f"{type(self).__name__} inherits no task; define _get_sample.")
