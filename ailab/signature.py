"""The parameters of a callable, and checks of names and values against them. Nothing is dropped.

A cfg can be text alone, so two things are converted: the name of a dtype, and numbers where a tensor is asked for.
"""

from __future__ import annotations

import inspect
import numbers
import os
import re
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import torch
from torch import Tensor, nn

from ailab.errors import ConfigError, more, nearest

_SHOWN = 24  # names listed in one message
_DTYPES = {n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype)}


@dataclass(frozen=True)
class AtLeast:
    """An annotation: the lowest value of a number, as in `Annotated[int, AtLeast(1)]`."""

    low: float


@dataclass(frozen=True)
class CheckedBy:
    """An annotation: a function that checks the value, as in `Annotated[Any, CheckedBy(check)]`."""

    check: Callable[[Any, str], list[str]]  # (value, path) -> problems


@dataclass(frozen=True)
class Parameters:
    """The parameters of a callable that can be passed by name."""

    types: Mapping[str, Any]  # name -> annotation; `Any` where there is none
    required: tuple[str, ...]
    open: bool = False  # has **kwargs

    def without(self, names: Collection[str]) -> Parameters:
        """The parameters without those called `names`."""
        types_ = {n: t for n, t in self.types.items() if n not in names}
        return replace(self, types=types_, required=tuple(n for n in self.required if n not in names))

    def joined(self, other: Parameters) -> Parameters:
        """The parameters of both. If a name is in both, `other` counts."""
        mine = self.without(other.types)
        return Parameters({**mine.types, **other.types}, mine.required + other.required, self.open or other.open)


def parameters(fn: Callable[..., Any]) -> Parameters:
    """The parameters of a function, of the constructor of a class, or of a callable object."""
    if inspect.isclass(fn) and issubclass(fn, nn.Module) and fn.__init__ is nn.Module.__init__:
        return Parameters({}, ())  # nn.Module declares (*args, **kwargs), and refuses both
    try:
        found = signature_of(fn).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return Parameters({}, (), open=True)
    named = [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Parameters(
        {p.name: _annotation(p) for p in named},
        tuple(p.name for p in needed),
        any(p.kind is p.VAR_KEYWORD for p in found),
    )


def _annotation(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is parameter.empty:
        return Any
    return parameter.annotation if parameter.default is not None else Union[parameter.annotation, None]  # `x: int = None`  # noqa: UP007


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of a callable. Annotations are types, or text where they exist for type checkers alone."""
    try:
        return inspect.signature(fn, eval_str=True)
    except (NameError, AttributeError, SyntaxError):  # an annotation that exists for type checkers alone: types are not checked
        if sys.version_info >= (3, 14):
            from annotationlib import Format

            return inspect.signature(fn, annotation_format=Format.STRING)
        return inspect.signature(fn)


def name_of(fn: Any) -> str:
    """The name of a callable for messages."""
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def short_name(type_: Any) -> str:
    """The last part of what a cfg names by `type`, be it a name, a dotted path or the object itself."""
    return (type_ if isinstance(type_, str) else name_of(type_)).rpartition(".")[2]


def name_list(names: Iterable[Any]) -> str:
    """Names for a message, separated by commas; of many, the first 24."""
    all_names = [str(n) for n in names]
    more = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
    return ", ".join(all_names[:_SHOWN]) + more


def check_arguments(takes: Parameters, given: Mapping[str, Any], path: str, what: str, topic: str | None = None) -> list[str]:
    """The problems of a call with keyword arguments: unknown names, wrong types, missing arguments.

    Args:
        takes: the parameters of the callable.
        given: the arguments by name.
        path: of the arguments in the cfg.
        what: the name of the callable.
        topic: what `ailab.help` shows them under; None where it cannot.

    Returns:
        Messages of at most 4 lines each; none if the call is right.
    """
    problems: list[str] = []
    for key, value in given.items():
        if key in takes.types:
            problems += mismatch(value, takes.types[key], f"{path}.{key}")
        elif not takes.open:
            offer = f"{what} takes: {name_list(takes.types)}." if takes.types else f"{what} takes no arguments."
            problems.append(f"{path}.{key}: {what} takes no '{key}'.\n {nearest(key, takes.types)} {offer}{more(topic)}")
    return problems + [f"{path}.{n}: {what} needs '{n}', and it was not given." for n in takes.required if n not in given]


def mismatch(value: Any, annotation: Any, path: str) -> list[str]:
    """The problem of a value that does not fit an annotation, as a list of at most one message.

    Only simple annotations are checked: builtins, None, `Literal`, unions, and containers of these. Any other accepts all values.
    """
    if check := _check_of(annotation):
        return check.check(value, path)
    if fits(value, annotation):
        return []
    came = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    kind = "" if value is None or isinstance(value, bool) else f"{type(value).__name__} "
    dtypes = torch.dtype in _members(annotation)
    wrong = next((v for v in _texts(value) if not (dtypes and v.removeprefix("torch.") in _DTYPES)), "")
    hint = nearest(wrong.removeprefix("torch."), [*_literals(annotation), *(_DTYPES if dtypes else ())])
    return [f"{path}: expected {described(annotation)}, got {kind}{came}." + (f"\n {hint}" if hint else "")]


def converted(value: Any, annotation: Any) -> Any:
    """A value of a cfg as its annotation asks for it: "float32" as `torch.float32`, [1, 2] as a float32 tensor.

    That is so where a dtype or a `Tensor` is asked for, and no text or list; also in the values of a dict. Any other value is
    unchanged.
    """
    members = _members(annotation)
    if isinstance(value, str):
        return _DTYPES.get(value.removeprefix("torch."), value) if torch.dtype in members and str not in members else value
    if isinstance(value, (list, tuple)):
        plain = any(get_origin(m) in (list, tuple, Sequence) or m in (list, tuple, Sequence) for m in members)
        return torch.tensor(value, dtype=torch.float32) if Tensor in members and not plain and _numbers(value) else value
    if isinstance(value, dict):
        inner = [get_args(m)[1] for m in members if get_origin(m) in (dict, Mapping) and len(get_args(m)) == 2]
        return {k: converted(v, inner[0]) for k, v in cast("dict[Any, Any]", value).items()} if inner else value
    return value


def _numbers(value: Any) -> bool:
    """Whether a value is a number, or a list of numbers or of such lists of one length."""
    if not isinstance(value, (list, tuple)):
        return _number(value, numbers.Real)
    items = list(cast("Sequence[Any]", value))
    lengths = {len(cast("Sequence[Any]", v)) if isinstance(v, (list, tuple)) else -1 for v in items}
    return len(lengths) == 1 and all(map(_numbers, items))


def _texts(value: Any) -> list[str]:
    """A text, or the texts in a dict."""
    values: list[Any] = list(cast("dict[Any, Any]", value).values()) if isinstance(value, dict) else [value]
    return [v for v in values if isinstance(v, str)]


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of any other annotation, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for a in get_args(annotation) for m in _members(a))
    return _members(get_args(annotation)[0]) if get_origin(annotation) is Annotated else (annotation,)


def _check_of(annotation: Any) -> CheckedBy | None:
    """The `CheckedBy` of an annotation, or of a member of a union."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    found = [a for m in members if get_origin(m) is Annotated for a in get_args(m)[1:] if isinstance(a, CheckedBy)]
    return found[0] if found else None


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value fits a simple annotation. An int fits float, a bool is no number, a list fits tuple and a tuple list."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is Annotated:
        return fits(value, args[0]) and all(value >= a.low for a in args[1:] if isinstance(a, AtLeast))
    rule = _RULES.get(origin or annotation) if isinstance(annotation, Hashable) else None
    return rule is None or rule(value, args)


def _number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _sequence(value: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return False
    return not args or all(fits(v, args[0]) for v in cast("Sequence[Any]", value))


def _tuple(value: Any, args: tuple[Any, ...]) -> bool:
    if not args or (len(args) == 2 and args[1] is Ellipsis):
        return _sequence(value, args)
    return _sequence(value, ()) and len(value) == len(args) and all(fits(v, a) for v, a in zip(value, args, strict=True))


def _mapping(value: Any, args: tuple[Any, ...]) -> bool:
    if not isinstance(value, Mapping):
        return False
    items = cast("Mapping[Any, Any]", value).items()
    return not args or all(fits(k, args[0]) and fits(v, args[1]) for k, v in items)


_RULES: dict[Any, Callable[[Any, tuple[Any, ...]], bool]] = {
    None: lambda v, _: v is None,
    type(None): lambda v, _: v is None,
    bool: lambda v, _: isinstance(v, bool),
    int: lambda v, _: _number(v, numbers.Integral),
    float: lambda v, _: _number(v, numbers.Real),
    str: lambda v, _: isinstance(v, str),
    Path: lambda v, _: isinstance(v, (str, os.PathLike)),
    Tensor: lambda v, _: _numbers(v) if isinstance(v, (list, tuple)) else not isinstance(v, (str, bool, dict)),
    torch.dtype: lambda v, _: isinstance(v, torch.dtype) or (isinstance(v, str) and v.removeprefix("torch.") in _DTYPES),
    list: _sequence,
    Sequence: _sequence,
    tuple: _tuple,
    dict: _mapping,
    Mapping: _mapping,
}


def check_choice(value: Any, literal: Any, what: str) -> None:
    """Check that a value is one of several choices. It is for values that do not come from a cfg, which is checked elsewhere.

    Args:
        value: what to check.
        literal: a `Literal[...]` of the choices.
        what: the name of the argument, for the message.

    Raises:
        ConfigError: the value is none of the choices.
    """
    if problems := mismatch(value, literal, what):
        raise ConfigError(problems[0])


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [x for a in get_args(annotation) for x in _literals(a)]


def described(annotation: Any) -> str:
    """An annotation as a message or a page of help shows it: `int >= 1`, `'step' | 'epoch'`, `float | Tensor`."""
    if isinstance(annotation, str):
        return annotation
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(described, args))
    if origin is Annotated:
        bound = "".join(f" >= {a.low:g}" for a in args[1:] if isinstance(a, AtLeast))
        return f"{described(args[0])}{bound}"
    if annotation is type(None):
        return "None"
    return re.sub(r"\b[a-z_]+\.", "", inspect.formatannotation(annotation))


@dataclass(frozen=True)
class Texts:
    """What a docstring says."""

    head: str  # up to its first section
    arguments: Mapping[str, str]  # of `Args:`, each as one paragraph
    rest: str  # the sections but for `Args:`


_SECTION = re.compile(r"^(Args|Arguments|Keyword Args|Keyword Arguments|Keyword args|[A-Z]\w+):\s*$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(\(.*?\))?\s*:\s*(.*)$")


def texts(fn: Any) -> Texts:
    """The docstring of a function or a class, taken apart: Google style, as ailab and torch write it.

    A class inherits the texts of arguments that it does not explain itself from its constructor and from the classes that it
    is derived from.
    """
    mine = _parsed(inspect.getdoc(fn) or "")
    if not inspect.isclass(fn):
        return mine
    inherited: dict[str, str] = {}
    for cls in reversed(inspect.getmro(fn)):
        inherited |= _parsed(inspect.cleandoc(vars(cls).get("__doc__") or "")).arguments
        inherited |= _parsed(inspect.cleandoc(getattr(vars(cls).get("__init__"), "__doc__", None) or "")).arguments
    return replace(mine, arguments={**inherited, **mine.arguments})


def _parsed(doc: str) -> Texts:
    head: list[str] = []
    rest: list[str] = []
    arguments: dict[str, list[str]] = {}
    into, indent, lines = "head", 0, doc.expandtabs().splitlines()
    for line in lines:
        if section := _SECTION.match(line):
            into, indent = ("args" if "arg" in section[1].lower() else "rest"), 0
        elif line.strip() and not line.startswith(" ") and into == "args":
            into = "rest"
        if into == "args" and not section and line.strip():
            indent = indent or len(line) - len(line.lstrip())
            start = _ARGUMENT.match(line[indent:]) if line[:indent].isspace() else None
            if start:
                arguments[start[1]] = [start[3]]
            elif arguments:
                arguments[next(reversed(arguments))].append(line.strip())
        elif into != "args":
            (head if into == "head" else rest).append(line)
    found = {name: " ".join(t for t in text if t) for name, text in arguments.items()}
    return Texts("\n".join(head).strip(), found, "\n".join(rest).strip())
