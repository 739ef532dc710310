"""Registries of components: `@MODELS.register_module()` adds one, `MODELS.build(dict(type="MyModel", ...), path)` builds it.

A `type` is a registered name, a name of torch or torchvision, a dotted path, or the object itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ailab.errors import AilabError, ConfigError, DataError, more, nearest
from ailab.signature import Parameters, check_arguments, converted, name_list, name_of, parameters

T = TypeVar("T", bound=Callable[..., Any])
_NO_KEYS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Entry:
    builder: Callable[..., Any]
    file: str  # where it was registered
    line: int

    @property
    def source(self) -> tuple[str, str]:
        """The identity of a definition. The name of the module does not count: `__main__` may be imported a second time."""
        return self.file, str(getattr(self.builder, "__qualname__", self.builder))


def _is_class(_: str, obj: Any) -> bool:
    return inspect.isclass(obj)


class Registry:
    """A registry of the components of one kind.

    Args:
        kind: the name of the kind in messages, such as "model".
        package: ailab's package with components of this kind. It is imported when the registry is first used.
        modules: modules of torch and torchvision that have such components. One that is not installed is skipped.
        offers: (name, object) -> whether an object of those modules is a component of this kind.
        functions: whether a function may be the component itself. It is, where the cfg leaves out arguments that it needs: a loss
            `(output, target) -> Tensor`, and no builder.
        injected: arguments that the framework passes; they are no keys of a cfg.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        modules: tuple[str, ...] = (),
        offers: Callable[[str, Any], bool] = _is_class,
        functions: bool = False,
        injected: tuple[str, ...] = (),
    ):
        self.kind, self.package, self.modules, self.injected = kind, package, modules, injected
        self._offers, self._functions = offers, functions
        self._entries: dict[str, _Entry] = {}

    def register_module(self, name: str | None = None, *, force: bool = False) -> Callable[[T], T]:
        """A decorator that registers a class or function.

        The same definition may be registered again, as when a cfg file is read twice: it replaces the earlier one.

        Args:
            name: of the component; by default the name of the class or function.
            force: replace another definition of this name.

        Raises:
            ConfigError: another definition has the name, and `force` is not set; or the parentheses are missing.
        """
        if name is not None and not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"write `@{self.kind.upper()}...register_module()`, with parentheses, over {name_of(name)}")
        frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] # where the decorator is used
        file = os.path.realpath(frame.f_code.co_filename)
        place = file if os.path.exists(file) else "<interactive>"  # a notebook has another file name for each cell

        def registered(builder: T) -> T:
            self._add(name or name_of(builder), _Entry(builder, place, frame.f_lineno), force)
            return builder

        return registered

    def _add(self, name: str, entry: _Entry, force: bool) -> None:
        if not f"{entry.builder.__module__}.".startswith(self.package + "."):
            importlib.import_module(self.package)  # ailab's own names are registered first, then the user's
        earlier = self._entries.get(name)
        if earlier is not None and earlier.source != entry.source and not force:
            raise ConfigError(
                f"there already is a {self.kind} '{name}', defined at {earlier.file}:{earlier.line}.\n"
                f"  Register under another name=..., or with force=True to replace it."
            )
        self._entries[name] = entry

    def names(self) -> list[str]:
        """The registered names, sorted; those of ailab are included."""
        importlib.import_module(self.package)
        return sorted(self._entries)

    def get(self, type_: Any, path: str = "type") -> Callable[..., Any]:
        """The builder for a `type`: a registered name, a name of torch, a dotted path, or the object itself.

        Args:
            type_: the `type` of a cfg entry.
            path: of `type_` in the cfg, for messages.

        Raises:
            ConfigError: there is no such builder, or its module cannot be imported.
        """
        if not isinstance(type_, str):
            if callable(type_):
                return type_
            raise ConfigError(f"{path}: expected a name, a class or a function, got {type(type_).__name__} {type_!r}.")
        if type_ in self.names():
            return self._entries[type_].builder
        if "." in type_ or ":" in type_:
            return _imported(type_, path)
        found = self.from_torch(type_, path)
        if type_ in found:
            return found[type_]
        own = self.names()
        elsewhere = f"a name of {self.modules[0]}, " if found else ""
        raise ConfigError(
            f"{path}: there is no {self.kind} '{type_}'.\n"
            f" {nearest(type_, [*own, *found])} Registered: {name_list(own) or 'none'}.\n"
            f"  Also possible: {elsewhere}a dotted path 'package.module.Name', or the object itself.{more('')}"
        )

    def own(self) -> dict[str, Callable[..., Any]]:
        """ailab's own components of this kind, by name."""
        found = {n: self._entries[n].builder for n in self.names()}
        return {n: b for n, b in found.items() if f"{b.__module__}.".startswith("ailab.")}

    def topic(self, type_: Any) -> str | None:
        """The name under which `ailab.help` shows a type; None for a type that only the cfg file knows."""
        known = isinstance(type_, str) and ("." in type_ or ":" in type_ or type_ not in self._entries or type_ in self.own())
        return type_ if known else None

    def from_torch(self, wanted: str, path: str) -> dict[str, Any]:
        """The components of this kind in torch and torchvision, by name.

        torchvision imports torch's compiler, which takes more than a second. If it is not imported yet and its source does not
        contain the word `wanted`, the source is searched for names instead, and the objects are placeholders.
        """
        found: dict[str, Any] = {}
        for module in self.modules:
            package = module.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                continue
            source = "" if package in sys.modules else _source(module)
            if source and not re.search(rf"\b{re.escape(wanted)}\b", source):
                members = [(name, _STAND_INS[kind]) for kind, name in _DEFINITION.findall(source)]
            else:
                members = list(cast("dict[str, Any]", vars(_module(module, path))).items())
            found.update({n: o for n, o in members if not n.startswith("_") and self._offers(n, o)})
        return found

    def check(
        self, cfg: Any, path: str, *, injected: Collection[str] | None = None, keys: Mapping[str, Any] = _NO_KEYS
    ) -> list[str]:
        """The problems that `build(cfg, path)` would have, as messages. Nothing is built.

        Args:
            cfg: `dict(type=..., **arguments)`.
            path: of `cfg`, for messages.
            injected: arguments that the framework passes, in place of those of the registry. They are not required in `cfg`, and
                not allowed there.
            keys: {key: type} of further keys of `cfg`, which the framework uses and the constructor does not get.
        """
        if not isinstance(cfg, Mapping):
            return [f"{path}: expected dict(type=...) of a {self.kind}, got {type(cfg).__name__} {cfg!r}."]
        given = dict(cast("Mapping[str, Any]", cfg))
        if "type" not in given:
            close = "".join(f" Did you mean 'type' by '{k}'?" for k in given if nearest(k, ["type"]))
            return [f"{path}: there is no `type`.{close}\n  Say which {self.kind}: {name_list(self.names())}."]
        type_ = given.pop("type")
        try:
            builder = self.get(type_, f"{path}.type")
        except ConfigError as e:
            return [str(e)]
        what = type_ if isinstance(type_, str) else name_of(type_)
        ours, topic = Parameters(keys, ()), self.topic(type_)
        if isinstance(builder, nn.Module):
            return check_arguments(ours, given, path, f"{what}, which is already built,")
        if self._is_component(builder, given):
            return check_arguments(Parameters(parameters(builder).types, ()).joined(ours), given, path, what)
        own_check = getattr(builder, "check", None)
        if not inspect.isfunction(builder) or own_check is None:
            takes = parameters(builder).without(self.injected if injected is None else injected).joined(ours)
            return check_arguments(takes, given, path, what, topic)
        rest = {k: given.pop(k) for k in list(given) if k not in keys}
        return [*check_arguments(ours, given, path, what, topic), *own_check(rest, path)]

    def _is_component(self, builder: Any, given: Mapping[str, Any]) -> bool:
        return (
            self._functions
            and (inspect.isfunction(builder) or inspect.isbuiltin(builder))
            and any(n not in given for n in parameters(builder).required)
        )

    def build(self, cfg: Mapping[str, Any], path: str, **injected: Any) -> Any:
        """Build a component: call the builder of `cfg["type"]` with the other entries of `cfg` as keyword arguments.

        Names of dtypes and numbers are converted where the builder is annotated with a dtype or a tensor. `cfg` keeps them.

        Args:
            cfg: `dict(type=..., **arguments)`; it is not changed.
            path: of `cfg`, for messages.
            injected: arguments that the framework passes, if the signature has them.

        Raises:
            ConfigError: the arguments do not fit, or the constructor raises a TypeError or ValueError.
            AilabError: what the constructor raises, with the path in front.
        """
        problems = self.check(cfg, path, injected=injected)
        if problems:
            raise ConfigError("\n".join(problems))
        builder = self.get(cfg["type"], f"{path}.type")
        if isinstance(builder, nn.Module):
            return builder
        takes = parameters(builder).types
        given = {k: converted(v, takes.get(k)) for k, v in cfg.items() if k != "type"}
        if self._is_component(builder, given):
            function = functools.partial(builder, **given)
            function.__name__ = name_of(builder)  # type: ignore[attr-defined]
            return function
        extra = {k: v for k, v in injected.items() if k in takes}
        try:
            return builder(**given, **extra)
        except (ConfigError, DataError) as e:
            located = ConfigError if isinstance(e, ConfigError) else DataError
            raise located(_located(str(e), path, name_of(builder), takes)) from e.__cause__
        except AilabError:
            raise
        except (TypeError, ValueError) as e:
            raise ConfigError(f"{path}: {name_of(builder)} could not be built: {e}") from e


def _located(text: str, path: str, what: str, takes: Collection[str]) -> str:
    """A message of a component with its path in the cfg: "transform.3: ..." as "cfg.data.train.transform.3: ..."."""
    lines: list[str] = []
    for line in text.splitlines():
        said = line.removeprefix(f"{what}: ").removeprefix(f"{what}.")
        argument = re.match(r"\w+(?=[.:\[])", said)
        if line.startswith(("cfg.", " ")) or (lines and not argument):
            lines.append(line)
        elif argument and argument[0] in takes:
            lines.append(f"{path}.{said}")
        else:
            lines.append(f"{path}: {line}" if not lines else line)
    return "\n".join(lines)


def _module(name: str, path: str) -> Any:
    """Import a module.

    Raises:
        ConfigError: the module does not exist, or raises when it is imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(e.name + ".")):
            raise ConfigError(f"{path}: there is no module '{e.name}' (for '{name}').") from e
        raise ConfigError(f"{path}: importing '{name}' failed: {e}.") from e
    except Exception as e:
        raise ConfigError(f"{path}: importing '{name}' failed: {type(e).__name__}: {e}") from e


def _imported(dotted: str, path: str) -> Callable[..., Any]:
    """The object at `package.module.Name` or `package.module:Name.inner`."""
    module, _, names = dotted.partition(":") if ":" in dotted else dotted.rpartition(".")
    if not module or not names or module.startswith("."):
        raise ConfigError(f"{path}: '{dotted}' is no path to an object; write 'package.module.Name'.")
    found = _module(module, path)
    for name in names.split("."):
        offered = [n for n in dir(found) if not n.startswith("_")]
        if not hasattr(found, name):
            raise ConfigError(f"{path}: '{module}' has no '{names}'.\n {nearest(name, offered)} It has: {name_list(offered)}.")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"{path}: '{dotted}' is {type(found).__name__}, which cannot be called.")
    return found


def _source(module: str) -> str:
    """The source of all files of a module of a package that need not be imported; empty where there is none."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    return "\n".join(f.read_text(encoding="utf-8") for f in sorted(Path(spec.origin).parent.joinpath(*inner).rglob("*.py")))


_DEFINITION = re.compile(r"^(class|def) (\w+)", re.MULTILINE)
_STAND_INS: dict[str, Any] = {"class": object, "def": _source}  # for `offers`, which asks whether it is a class or a function


def _subclass(base: type) -> Callable[[str, Any], bool]:
    return lambda _, obj: inspect.isclass(obj) and issubclass(obj, base) and obj is not base


def _is_model(name: str, obj: Any) -> bool:
    return inspect.isfunction(obj) and not name.startswith(("get_", "list_"))


_VISION = tuple(f"torchvision.models{m}" for m in ("", ".segmentation", ".detection", ".video", ".optical_flow"))

DATASETS = Registry("dataset", "ailab.datasets", ("torchvision.datasets",))
MODELS = Registry("model", "ailab.models", _VISION, _is_model)
LOSSES = Registry("loss", "ailab.losses", ("torch.nn",), lambda name, _: name.endswith("Loss"), functions=True)
METRICS = Registry("metric", "ailab.metrics", functions=True)
HOOKS = Registry("hook", "ailab.hooks", injected=("run", "name"))
OPTIMIZERS = Registry("optimizer", "ailab.optim", ("torch.optim",), _subclass(torch.optim.Optimizer), injected=("params",))
LR_SCHEDULERS = Registry(
    "lr scheduler",
    "ailab.optim",
    ("torch.optim.lr_scheduler",),
    _subclass(torch.optim.lr_scheduler.LRScheduler),
    injected=("optimizer",),
)
TRANSFORMS = Registry("transform", "ailab.datasets", ("torchvision.transforms.v2",))
COLLATES = Registry("collate function", "ailab.datasets")
SAMPLERS = Registry("sampler", "ailab.datasets")
REGISTRIES = (MODELS, LOSSES, OPTIMIZERS, LR_SCHEDULERS, HOOKS, METRICS, DATASETS, TRANSFORMS, COLLATES, SAMPLERS)
