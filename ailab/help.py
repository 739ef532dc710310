"""`python -m ailab.help`: every name that a cfg can use, with its line; one name, or a place such as cfg.data, in full."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ailab.binding import bind, has_forward
from ailab.config.schema import PHASES, SECTIONS
from ailab.errors import AilabError, ConfigError, more, nearest
from ailab.registry import (
    COLLATES,
    DATASETS,
    HOOKS,
    LOSSES,
    LR_SCHEDULERS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    REGISTRIES,
    SAMPLERS,
    TRANSFORMS,
    Registry,
)
from ailab.signature import check_arguments, described, parameters, signature_of, texts

_WIDTH = 110
_PLACES = {  # of a cfg, where the names of a kind go
    MODELS: "cfg.model",
    LOSSES: "cfg.loss",
    OPTIMIZERS: "cfg.optimizer",
    LR_SCHEDULERS: "the `scheduler` of LrSchedulerHook",
    HOOKS: "cfg.hooks",
    METRICS: "the entries of MetricHook",
    DATASETS: ", ".join(f"cfg.data.{phase}" for phase in PHASES),
    TRANSFORMS: "the `transform` of a dataset, and `ops` of AugmentHook",
    COLLATES: "the `collate_fn` of cfg.data.train_dataloader",
    SAMPLERS: "the `sampler` of cfg.data.train_dataloader",
}
_AT: dict[str, Registry] = {  # what stands at a place
    **{place: kind for kind, place in _PLACES.items() if place in SECTIONS},
    **{f"cfg.data.{phase}": DATASETS for phase in PHASES},
    **{f"cfg.data.{phase}_dataloader.collate_fn": COLLATES for phase in PHASES},
    **{f"cfg.data.{phase}_dataloader.sampler": SAMPLERS for phase in PHASES},
}


def page(topic: str = "") -> str:
    """What there is to know about a topic.

    Args:
        topic: a registered name or one of torch or torchvision, a dotted path, a place in a cfg; "" for all names.

    Raises:
        ConfigError: when nothing goes by that name.
    """
    if not topic:
        return _all()
    if topic == "cfg" or topic.startswith("cfg."):
        return _place(topic)
    if "." in topic or ":" in topic:
        return _component(topic, None, MODELS.get(topic, topic))
    found: list[str] = []
    names = [*SECTIONS]
    for registry in REGISTRIES:
        offered = {**registry.from_torch(topic, topic), **registry.own()}
        names += offered
        if topic in offered:
            found.append(_component(topic, registry, offered[topic]))
    if not found:
        raise ConfigError(f"there is no '{topic}'.{nearest(topic, names)}{more('')}")
    return "\n\n".join(found)


def _all() -> str:
    parts = [
        "What a cfg can say, by kind. More about one: python -m ailab.help NAME. The keys of a cfg: python -m ailab.help cfg"
    ]
    for registry in REGISTRIES:
        lines = [f"{registry.kind}, at {_PLACES[registry]}"]
        own = registry.own()
        width = max([len(n) for n in own], default=0)
        folders = sorted({_folder(b) for b in own.values()}) if registry is HOOKS else [None]
        for folder in folders:
            lines += [f"  {folder}: {_about(folder)}"] if folder else []
            mine = {n: b for n, b in own.items() if folder in (None, _folder(b))}
            lines += [f"  {n:<{width}}  {summary(b)}" for n, b in mine.items()]
        lines += _others(registry)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _others(registry: Registry) -> list[str]:
    """The names of torch that are at hand; torchvision would have to be imported."""
    near = [m for m in registry.modules if m.startswith("torch.")]
    names = sorted(registry.from_torch("", "help")) if near else []
    far = [m for m in registry.modules if m not in near]
    return [
        *(_wrapped(f"of {' and '.join(near)}: {', '.join(names)}", "  ") if near else []),
        *(_wrapped(f"and the names of {', '.join(far)}", "  ") if far else []),
    ]


def summary(fn: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(fn) or "").partition("\n")[0]


def _folder(builder: Any) -> str:
    return str(builder.__module__).rpartition(".")[0].replace(".", "/")


def _about(folder: str) -> str:
    return summary(importlib.import_module(folder.replace("/", ".")))


def _component(name: str, registry: Registry | None, builder: Callable[..., Any]) -> str:
    """The page of a component: what it is and where, what it says, what it takes."""
    module = str(getattr(builder, "__module__", None) or type(builder).__module__)
    own = f"{module}.".startswith("ailab.")
    said = texts(builder)
    lines = [f"{name}: {registry.kind + ', ' if registry else ''}{module.replace('.', '/') + '.py' if own else f'of {module}'}"]
    if registry is HOOKS and own:
        lines += [f"  {_about(_folder(builder))}"]
    head = said.head if own else _plain(said.head.partition("\n\n")[0])
    lines += ["", head, "", *_rows(builder, registry.injected if registry else ())]
    if registry in (MODELS, LOSSES, METRICS) and (fields := _fields(builder)):
        lines += _wrapped(f"is called with: {', '.join(fields)}; of the fields by these names, or as `mapping` says", "  ")
    if registry and _PLACES[registry] in SECTIONS:
        keys = ", ".join(parameters(SECTIONS[_PLACES[registry]]).types)
        lines += [f"  and what each {registry.kind} takes: {keys}", _more(_PLACES[registry])]
    return "\n".join([*lines, "", said.rest] if own and said.rest else lines)


def _more(topic: str) -> str:
    return more(topic).removeprefix("\n")


def _rows(fn: Callable[..., Any], injected: Iterable[str] = ()) -> Iterator[str]:
    """Each argument with its type and default, and what it means."""
    takes, said = parameters(fn).without([*injected]), texts(fn).arguments
    for name, value in arguments(fn).items():
        if name.lstrip("*") not in takes.types and not name.startswith("**"):
            continue
        kind = takes.types.get(name, Any)
        shown = "" if value is inspect.Parameter.empty else f" = {str(value) if isinstance(value, enum.Enum) else repr(value)}"
        yield f"  {name}{'' if kind is Any else f': {described(kind)}'}{shown}"
        yield from _wrapped(_plain(said.get(name.lstrip("*"), "")), "      ")


def arguments(fn: Callable[..., Any]) -> dict[str, Any]:
    """The default of each argument that can be given by name, `inspect.Parameter.empty` where there is none; also "**kwargs"."""
    named = parameters(fn).types
    try:
        found = signature_of(fn).parameters.values()
    except (TypeError, ValueError):
        return {}
    fields: dict[str, Any] = getattr(fn, "__dataclass_fields__", {})
    made = {n: f.default_factory() for n, f in fields.items() if f.default_factory is not dataclasses.MISSING}
    open_ = {f"**{p.name}": p.empty for p in found if p.kind is p.VAR_KEYWORD and parameters(fn).open}
    return {p.name: made.get(p.name, p.default) for p in found if p.name in named} | open_


def _fields(builder: Any) -> tuple[str, ...]:
    """What a model, a loss or a metric is called with, where that can be seen without building it."""
    if has_forward(builder) or hasattr(builder, "update"):
        return bind(builder, {}, "").names
    if inspect.isclass(builder) and "__call__" in dir(builder):
        return tuple(parameters(builder.__call__).without(("self",)).types)
    return ()


def _place(topic: str) -> str:
    """The page of a place in a cfg: a section with its keys, or one key."""
    section, rest = _section(topic)
    if not rest:
        cls = SECTIONS[section]
        return "\n".join([f"{topic}: {texts(cls).head}", "", *_rows(cls), *_names_at(section)])
    cls, key = SECTIONS[section], rest[0]
    if len(rest) > 1 or (key not in parameters(cls).types and section in _AT):
        raise ConfigError(f"{topic} is a matter of the `type` there: ask for that by its name.{more(section)}")
    if problems := [p for p in check_arguments(parameters(cls), {key: None}, section, section, section) if " takes no " in p]:
        raise ConfigError(problems[0])
    taken = _only(list(_rows(cls)), key)
    return "\n".join([f"{topic}", "", *taken, *_names_at(f"{section}.{key}")])


def _section(topic: str) -> tuple[str, list[str]]:
    """The section that a path leads to, and the keys that are left: names of hooks and numbers of phases are free."""
    section, rest = "cfg", topic.split(".")[1:]
    while rest and f"{section}.{rest[0]}" in SECTIONS:
        section = f"{section}.{rest.pop(0)}"
    if section == "cfg.workflow" and rest and rest[0].isdecimal():
        rest.pop(0)
        if rest and rest[0] not in parameters(SECTIONS[section]).types:
            section = "cfg.hooks"  # a phase switches a hook
    if section == "cfg.hooks":
        rest = rest[1:]
    return section, rest


def _only(rows: Sequence[str], key: str) -> list[str]:
    """The lines of one key."""
    start = next(i for i, row in enumerate(rows) if re.match(rf"  {key}\b", row))
    end = next((i for i, row in enumerate(rows) if i > start and not row.startswith("   ")), len(rows))
    return list(rows[start:end])


def _names_at(place: str) -> list[str]:
    """What `type` can be at a place."""
    registry = _AT.get(place)
    if registry is None:
        return []
    own = ", ".join(registry.names()) or "a name of one's own"
    others = f"; a name of {', '.join(registry.modules)}" if registry.modules else ""
    return ["", *_wrapped(f"type: {own}{others}; a dotted path; or the object itself", "  "), _more("NAME")]


def _wrapped(text: str, indent: str) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines


def _plain(text: str) -> str:
    """Text without the roles of reStructuredText, in which torch writes."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ailab.help", description="Tell what a cfg can say.")
    parser.add_argument(
        "topic", nargs="?", default="", help="EMAHook, AdamW, torch.nn.Linear, cfg, cfg.data.train_dataloader, ..."
    )
    args = parser.parse_args(argv)
    try:
        print(page(args.topic), flush=True)
    except BrokenPipeError:  # a pager or `head` has seen enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AilabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
