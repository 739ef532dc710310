"""Fields to arguments, by name and never by position: `mapping = {parameter: field}`; a model's result to named fields."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from ailab.errors import ConfigError, DataError, nearest
from ailab.signature import Parameters, name_list, name_of, parameters

OUTPUT_KEYS = ("output",)  # what a model's result is called where the cfg does not say
_NONE: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True)
class Binding:
    """Which field each parameter of one callable is given."""

    path: str  # of the component in the cfg, e.g. "cfg.loss"
    what: str  # its name in messages
    mapped: tuple[tuple[str, str], ...]  # (parameter, field): as the cfg says; the field must exist
    free: tuple[tuple[str, tuple[str, ...]], ...]  # (parameter, fields): given the first of these that exists
    required: tuple[str, ...]
    names: tuple[str, ...]
    open: bool  # has **kwargs, so any parameter can be mapped

    def kwargs(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for one call. An optional parameter without a field is left to its default.

        Raises:
            KeyError: when a field that `mapping` names is missing; `check` reports that beforehand.
        """
        given = {p: fields[f] for p, some in self.free for f in some[::-1] if f in fields}  # the first one stays
        return {**given, **{p: fields[f] for p, f in self.mapped}}

    def may_read(self, field: str) -> bool:
        """Whether a parameter is given this field, where a batch has it."""
        return any(field in some for _, some in self.free) or any(f == field for _, f in self.mapped)

    def check(self, fields: Collection[str] | None = None) -> list[str]:
        """The problems of calling with these fields; without fields only whether the mapped parameters exist."""
        strange = [p for p, _ in (*self.mapped, *self.free) if p not in self.names and not self.open]
        problems = [
            f"{self.path}.mapping.{p}: {self.what} has no parameter '{p}'.\n"
            f" {nearest(p, self.names)} {self.what} takes: {name_list(self.names) or 'nothing by name'}."
            for p in strange
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
            f"{self.path}: {self.what} needs '{p}', and no field goes by that name.\n"
            f"  Say which one it is: mapping={{'{p}': ...}}. Fields: {name_list(fields)}."
            for p in self.required
            if p not in bound
        ]


def bind(fn: Any, mapping: Mapping[str, str], path: str, *, defaults: Mapping[str, Sequence[str]] = _NONE) -> Binding:
    """How the parameters of `fn` get their fields: by `mapping`, else by `defaults`, else by their own name.

    Of a module (object or class) `forward` is bound; of a metric, which has `update` and `compute`, `update`.

    Args:
        fn: a function, a module, or a metric; it is not called here.
        mapping: {parameter: field}, from the cfg. A reserved field ("_weight") is given where a batch has it.
        path: of the component in the cfg.
        defaults: {parameter: fields} for parameters that `mapping` leaves out: the first of these fields that exists, in place
            of the field of the parameter's own name.
    """
    takes = _called(fn)
    mapped = {p: f for p, f in mapping.items() if not f.startswith("_")}
    chosen = {p: (f,) for p, f in mapping.items() if p not in mapped}
    free = {p: tuple(defaults.get(p, (p,))) for p in takes.types if p not in mapped} | chosen
    return Binding(
        path, name_of(fn), tuple(mapped.items()), tuple(free.items()), takes.required, tuple(takes.types), takes.open
    )


def has_forward(fn: Any) -> bool:
    """Whether `fn` is a module or a class of modules, so that its `forward` can be looked at."""
    return isinstance(fn, nn.Module) or (isinstance(fn, type) and issubclass(fn, nn.Module))


def _called(fn: Any) -> Parameters:
    """The parameters of the function that a step calls, without `self`."""
    is_metric = callable(getattr(fn, "update", None)) and callable(getattr(fn, "compute", None))
    is_module = has_forward(fn)
    if not is_metric and not is_module:
        return parameters(fn)
    takes = parameters(getattr(fn, "update" if is_metric else "forward"))
    return takes.without(("self",)) if isinstance(fn, type) else takes


def name_outputs(value: Any, output_keys: Sequence[str] | None, path: str) -> dict[str, Any]:
    """The result of a model as named fields.

    Args:
        value: a tensor; a tuple or list, named one by one; or a dict, which keeps its names.
        output_keys: the names. Of a dict they select; `None` or the default `("output",)` keeps all of it.
        path: of `output_keys` in the cfg.

    Raises:
        ConfigError: when the names and the parts differ in number, a dict lacks a name, or the result is none of these.
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
            "  Name every one, e.g. output_keys=['output', 'aux']; none is dropped."
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
    """The problems of adding the model's outputs to the fields of a batch: an output must not hide one."""
    return [
        f"{path}: the output '{k}' would hide the batch field '{k}'.\n  Give the output another name."
        for k in output_keys
        if k in batch_fields
    ]


def wrap_sample(sample: Any) -> dict[str, Any]:
    """What a dataset delivers, as named fields: a dict; `(input, target, field2, ...)`; or a bare tensor or array, the input.

    Raises:
        DataError: for anything else.
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
