"""Tables: one sample per row of a CSV (also compressed) or Excel file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.errors import DataError, nearest
from ailab.registry import DATASETS

Column = str | int  # a name of the header, or a position; negative positions count from the end


class TableAnnotationDataset(LabBaseDataset):
    """Storage of a table. A raw record is one row, as a pandas Series. pandas reads the table once.

    Args:
        table_path: A .csv (also compressed), .tsv, .xls or .xlsx file.
        loader_fun: A function path -> DataFrame. It replaces the reader for the file extension.
        header: Whether the first row has the column names.
        columns: Names of columns that the table must have.
        unique: Name of a column whose values must be unique.
        **read: Arguments for the pandas reader, such as `sep`, `sheet_name` or `usecols`.

    Raises:
        DataError: The file cannot be read as a table, has no row, lacks a column, or two rows have the same value of `unique`.
    """

    def __init__(
        self,
        table_path: str | Path,
        loader_fun: Callable[..., Any] | None = None,
        *,
        header: bool = True,
        columns: Sequence[str] = (),
        unique: str | None = None,
        **read: Any,
    ):
        self.table_path = Path(table_path)
        self.table: Any = _read(self.table_path, loader_fun, {**read} if header or loader_fun else {"header": None, **read})
        names = list(self.table.columns)
        for name in [*columns, *([unique] if unique else [])]:
            if name not in names:
                hint = f"{nearest(name, map(str, names))}\n  It has: {names[:20]}"
                raise DataError(f"{self.table_path}: there is no column {name!r}.{hint}")
        if not len(self.table):
            raise DataError(f"{self.table_path}: the split is empty: the table has no row.")
        if unique and len(again := self.table.index[self.table[unique].duplicated()]):
            value = self.table[unique].loc[again[0]]
            raise DataError(
                f"{self.table_path}: record {again[0]}, column {unique!r}: {value!r} occurs twice. It must be unique."
            )

    def _len(self) -> int:
        return len(self.table)

    def _get_raw(self, index: int) -> Any:
        return self.table.iloc[index]


@DATASETS.register_module()
class TableDataset(TableAnnotationDataset):
    """A table of numbers, held in memory: `{"input": (columns,) float32, "target": ()}`.

    A target column of integers gives int64, of other numbers float32. A target column of text gives class indices, int64; `classes`
    has the names.

    Args:
        table_path: A .csv (also compressed), .tsv, .xls or .xlsx file.
        inputs: Input columns, by name or position. Default: all columns except the target.
        target: Target column, by name or position. None for a table without a target.
        header: Whether the first row has the column names.
        **read: Arguments for the pandas reader, such as `sep`, `sheet_name` or `usecols`.

    Raises:
        DataError: The file cannot be read, has no such column, or an input cell is empty or not a number.
    """

    classes: list[str] | None = None  # the distinct values of a target column of text, sorted

    def __init__(
        self,
        table_path: str | Path,
        *,
        inputs: Sequence[Column] | None = None,
        target: Column | None = -1,
        header: bool = True,
        **read: Any,
    ):
        super().__init__(table_path, header=header, **read)
        at = None if target is None else self._column(target)
        columns = [c for c in self.table.columns if c != at] if inputs is None else [self._column(c) for c in inputs]
        self._fields: dict[str, Tensor] = {"input": self._numbers(columns)}
        if at is not None:
            self._fields["target"] = self._targets(at)

    def tensors(self) -> dict[str, Tensor]:
        """All samples, stacked."""
        return self._fields

    def _get_raw(self, index: int) -> Any:
        return {name: values[index] for name, values in self._fields.items()}

    def _get_sample(self, raw: Any) -> Any:
        return raw

    def _column(self, wanted: Column) -> Any:
        names = list(self.table.columns)
        if wanted in names and isinstance(wanted, str):
            return wanted
        if isinstance(wanted, int) and -len(names) <= wanted < len(names):
            return names[wanted]
        hint = nearest(str(wanted), [str(n) for n in names])
        raise DataError(f"{self.table_path}: there is no column {wanted!r}.{hint}\n  It has: {names[:20]}")

    def _numbers(self, columns: list[Any]) -> Tensor:
        import pandas as pd

        part = self.table[columns].apply(pd.to_numeric, errors="coerce")
        holes = part.isna().to_numpy().nonzero()
        if len(holes[0]):
            row, column = int(holes[0][0]), columns[int(holes[1][0])]
            value = self.table[column].iloc[row]
            what = "is empty" if pd.isna(value) else f"has {value!r}, which is not a number"
            raise DataError(f"{self.table_path}: record {row}, column {column!r} {what}.")
        return torch.from_numpy(part.to_numpy("float32", copy=True))

    def _targets(self, column: Any) -> Tensor:
        import pandas as pd

        values = self.table[column]
        if values.isna().any():
            raise DataError(f"{self.table_path}: record {int(values.isna().argmax())}, column {column!r} is empty.")
        if not pd.api.types.is_numeric_dtype(values):
            self.classes = sorted(set(values.astype(str)))
            index = {name: i for i, name in enumerate(self.classes)}
            return torch.tensor([index[v] for v in values.astype(str)])
        whole = pd.api.types.is_integer_dtype(values) or pd.api.types.is_bool_dtype(values)
        return torch.from_numpy(values.to_numpy("int64" if whole else "float32", copy=True))


def _read(path: Path, loader: Callable[..., Any] | None, options: dict[str, Any]) -> Any:
    """The table as a DataFrame."""
    import pandas

    pd: Any = pandas  # its readers have incomplete types
    excel = path.suffix.lower() in (".xls", ".xlsx")
    if path.suffix.lower() == ".tsv":
        options = {"sep": "\t", **options}
    reader = loader or (pd.read_excel if excel else pd.read_csv)
    try:
        return reader(path, **options)
    except ImportError as error:
        raise DataError(f"{path}: reading it needs a package: {error}") from error
    except (OSError, ValueError, EOFError) as error:  # pandas' own parser errors are ValueErrors
        raise DataError(f"{path}: cannot be read as a table: {type(error).__name__}: {error}") from error
