"""Bind the fields of a batch to parameters by name, `mapping = {parameter: field}`, and name the outputs of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from ailab.errors import ConfigError, DataError, nearest
from ailab.signature import Parameters, name_list, name_of, parameters

OUTPUT_KEYS = ("output",)  # the default name of the output of a model
_NONE: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True)
class Binding:
    """Which field each parameter of a callable gets."""

    path: str  # of the component in the cfg, e.g. "cfg.loss"
    what: str  # its name in messages
    mapped: tuple[tuple[str, str], ...]  # (parameter, field): as the cfg says; the field must exist
    free: tuple[tuple[str, tuple[str, ...]], ...]  # (parameter, fields): given the first of these that exists
    required: tuple[str, ...]
    names: tuple[str, ...]
    open: bool  # has **kwargs, so any parameter can be mapped

    def kwargs(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments for one call. An optional parameter without a field keeps its default.

        Args:
            fields: the values by name.

        Raises:
            KeyError: a field that `mapping` names is missing. `check` reports that before a run.
        """
        given = {p: fields[f] for p, some in self.free for f in some[::-1] if f in fields}  # the first one stays
        return {**given, **{p: fields[f] for p, f in self.mapped}}

    def may_read(self, field: str) -> bool:
        """Whether a parameter is given this field, where a batch has it."""
        return any(field in some for _, some in self.free) or any(f == field for _, f in self.mapped)

    def check(self, fields: Collection[str] | None = None) -> list[str]:
        """The problems of a call with these fields, as messages. Without fields, only the mapped parameters are checked."""
        unknown = [p for p, _ in (*self.mapped, *self.free) if p not in self.names and not self.open]
        problems = [
            f"{self.path}.mapping.{p}: {self.what} has no parameter '{p}'.\n"
            f" {nearest(p, self.names)} {self.what} takes: {name_list(self.names) or 'nothing by name'}."
            for p in unknown
        ]
        if fields is None:
            return problems
        problems += [
            f"{self.path}.mapping.{p}: there is no field '{f}'.\n {nearest(f, fields)} Fields: {name_list(fields)}."
            for p, f in self.mapped
            if f not in fields
        ]
        bound = {p for p, _ in self.mapped} | {p for p, some in self.free if any(f in fields for f in some)}
        return problems + [
            f"{self.path}: {self.what} needs '{p}', and no field has that name.\n"
            f"  Choose a field: mapping={{'{p}': ...}}. Fields: {name_list(fields)}."
            for p in self.required
            if p not in bound
        ]


def bind(fn: Any, mapping: Mapping[str, str], path: str, *, defaults: Mapping[str, Sequence[str]] = _NONE) -> Binding:
    """Bind the parameters of a callable to fields: by `mapping`, else by `defaults`, else by their own name.

    For a module (object or class) its `forward` is bound. For a metric, which has `update` and `compute`, `update` is bound.

    Args:
        fn: a function, a module, or a metric; it is not called here.
        mapping: {parameter: field}, from the cfg. A reserved field ("_weight") is given where a batch has it.
        path: of the component in the cfg.
        defaults: {parameter: fields} for parameters that are not in `mapping`: the first of these fields that exists.
    """
    takes = _called(fn)
    mapped = {p: f for p, f in mapping.items() if not f.startswith("_")}
    chosen = {p: (f,) for p, f in mapping.items() if p not in mapped}
    free = {p: tuple(defaults.get(p, (p,))) for p in takes.types if p not in mapped} | chosen
    return Binding(
        path, name_of(fn), tuple(mapped.items()), tuple(free.items()), takes.required, tuple(takes.types), takes.open
    )


def has_forward(fn: Any) -> bool:
    """Whether `fn` is an `nn.Module` or a class of them, so that it has a `forward`."""
    return isinstance(fn, nn.Module) or (isinstance(fn, type) and issubclass(fn, nn.Module))


def _called(fn: Any) -> Parameters:
    """The parameters of the function that a training step calls, without `self`."""
    is_metric = callable(getattr(fn, "update", None)) and callable(getattr(fn, "compute", None))
    is_module = has_forward(fn)
    if not is_metric and not is_module:
        return parameters(fn)
    takes = parameters(getattr(fn, "update" if is_metric else "forward"))
    return takes.without(("self",)) if isinstance(fn, type) else takes


def name_outputs(value: Any, output_keys: Sequence[str] | None, path: str) -> dict[str, Any]:
    """The output of a model as named fields.

    Args:
        value: a tensor; a tuple or list, which gets one name per part; or a dict, which keeps its names.
        output_keys: the names. Of a dict they select entries; `None` and the default `("output",)` keep all entries.
        path: of `output_keys` in the cfg.

    Raises:
        ConfigError: the number of names is not that of the parts, a dict has no entry of a name, or the output is of
            another type.
    """
    keys = OUTPUT_KEYS if output_keys is None else tuple(output_keys)
    if isinstance(value, Mapping):
        named = dict(cast("Mapping[str, Any]", value))
        return named if keys == OUTPUT_KEYS else {k: _part(named, k, path) for k in keys}
    if not isinstance(value, (Tensor, tuple, list)):
        raise ConfigError(f"{path}: the model returned {type(value).__name__}; expected a tensor, a tuple, a list or a dict.")
    parts = (value,) if isinstance(value, Tensor) else cast("Sequence[Any]", value)
    if len(parts) != len(keys):
        raise ConfigError(
            f"{path}: {_count(keys, 'name')} ({name_list(keys)}), but the model returned {_count(parts, 'value')}.\n"
            "  Name every value, e.g. output_keys=['output', 'aux']. None is dropped."
        )
    return dict(zip(keys, parts, strict=True))


def _part(named: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in named:
        raise ConfigError(
            f"{path}: the model returned a dict without '{key}'.\n {nearest(key, named)} It returned: {name_list(named)}."
        )
    return named[key]


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def check_outputs(output_keys: Collection[str], batch_fields: Collection[str], path: str) -> list[str]:
    """The problems of the names of a model's outputs, as messages. An output must not have the name of a batch field."""
    return [
        f"{path}: the output '{k}' would hide the batch field '{k}'.\n  Give the output another name."
        for k in output_keys
        if k in batch_fields
    ]


def wrap_sample(sample: Any) -> dict[str, Any]:
    """A sample of a dataset as named fields.

    Args:
        sample: a dict; a tuple or list `(input, target, field2, ...)`; or a tensor or array, which is the input.

    Raises:
        DataError: the sample is of another type, or an empty tuple or list.
    """
    if isinstance(sample, Mapping):
        return dict(cast("Mapping[str, Any]", sample))
    parts: list[Any] = []
    if isinstance(sample, (tuple, list)):
        parts += cast("Sequence[Any]", sample)
    elif hasattr(sample, "shape") and hasattr(sample, "dtype"):
        parts.append(sample)
    if parts:
        return {("input", "target")[i] if i < 2 else f"field{i}": part for i, part in enumerate(parts)}
    empty = "an empty " if isinstance(sample, (tuple, list)) else ""
    raise DataError(
        f"the dataset delivered {empty}{type(cast('Any', sample)).__name__} as a sample.\n"
        "  Return a dict of fields, a tuple (input, target), or a tensor or an array."
    )
