"""The check of a whole cfg before anything is built: all its mistakes at once; and its completion with every default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ailab.binding import bind, has_forward
from ailab.config.load import copy_containers
from ailab.config.schema import (
    PHASES,
    Cfg,
    Compile,
    Criterion,
    Data,
    Dist,
    Init,
    Loader,
    Model,
    Optimizer,
    Phase,
    Switch,
    is_several,
)
from ailab.errors import ConfigError
from ailab.registry import COLLATES, DATASETS, HOOKS, LOSSES, MODELS, OPTIMIZERS, SAMPLERS, Registry
from ailab.signature import Parameters, check_arguments, parameters, short_name

_SHARDS = {
    "zero1": "every rank holds the whole TrainState, bit for bit the same, and rank 0 alone saves it; optimizer memory of a\n"
    "  rank's own parameters would have to be gathered for each checkpoint and cut again at each resumption.",
    "fsdp": "fully_shard makes DTensors of a module's own parameters and gathers them in hooks of its forward; here parameters\n"
    "  are plain tensors of the TrainState, which a pure function is called with.",
}


def complete(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a checked cfg with every default filled in and `hooks` as a dict by name, in their order."""
    full = _filled(Cfg, copy_containers(dict(cfg)))
    full["workflow"] = [_filled(Phase, p) for p in _workflow(full)]
    full["dist"] = _filled(Dist, full["dist"])
    full["data"] = _filled(Data, full["data"])
    for phase in PHASES:
        full["data"][f"{phase}_dataloader"] = _filled(Loader, full["data"][f"{phase}_dataloader"])
    for key, section in (("model", Model), ("loss", Criterion), ("optimizer", Optimizer), ("compile", Compile)):
        if isinstance(full[key], dict):
            full[key] = _filled(section, full[key])
    if full["model"]["init"] is not None:
        full["model"]["init"] = _filled(Init, full["model"]["init"])
    full["hooks"] = {name: _filled(Switch, entry) for name, _, entry in _hooks(full["hooks"])}
    return full


def _filled(section: type, given: dict[str, Any]) -> dict[str, Any]:
    made = {f.name: f.default_factory() for f in dataclasses.fields(section) if f.default_factory is not dataclasses.MISSING}
    plain = {f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING}
    return {**plain, **made, **given}


def check(cfg: Any) -> None:
    """Find every mistake in a cfg that can be found without building anything.

    Raises:
        ConfigError: one that lists all problems: where each is, what came, the nearest name and what is on offer.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"cfg: expected a dict, got {type(cfg).__name__}.")
    known = cast("Mapping[str, Any]", cfg)
    problems = check_arguments(parameters(Cfg), known, "cfg", "a cfg", "cfg")
    problems += (
        _section(Dist, known.get("dist"), "cfg.dist")
        + _check_shard(known.get("dist"))
        + _section(Compile, known.get("compile"), "cfg.compile")
    )
    problems += _check_data(known.get("data"))
    problems += _component(MODELS, Model, known, "model") + _component(LOSSES, Criterion, known, "loss")
    problems += _component(OPTIMIZERS, Optimizer, known, "optimizer")
    problems += _section(Init, _dict(known.get("model")).get("init"), "cfg.model.init")
    problems += _check_hooks(known.get("hooks")) + _check_resume(known) + _check_workflow(known)
    if problems:
        raise ConfigError("\n".join(problems))


def _check_shard(value: Any) -> list[str]:
    shard = _dict(value).get("shard")
    if shard not in _SHARDS:  # None, or reported where its type is checked
        return []
    return [
        f"cfg.dist.shard is {shard!r}, which is not served: {_SHARDS[shard]}\n"
        "  For memory: AMPHook, RematHook, GradAccumulateHook, or an optimizer with little of it (Adafactor, SGD)."
    ]


def _dict(value: Any) -> dict[str, Any]:
    """A dict of the cfg; what is none counts as empty, for it was reported where its key was read."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []


def _section(section: type, given: Any, path: str) -> list[str]:
    """A dict of the cfg against the keys that it may have."""
    return check_arguments(parameters(section), _dict(given), path, path, path) if isinstance(given, dict) else []


def _check_data(value: Any) -> list[str]:
    problems, data = _section(Data, value, "cfg.data"), _dict(value)
    for phase in PHASES:
        problems += _section(Loader, data.get(f"{phase}_dataloader"), f"cfg.data.{phase}_dataloader")
        loader, path = _dict(data.get(f"{phase}_dataloader")), f"cfg.data.{phase}_dataloader"
        if isinstance(collate := loader.get("collate_fn"), (str, dict)):
            entry = {"type": collate} if isinstance(collate, str) else collate
            problems += COLLATES.check(entry, f"{path}.collate_fn")
        if loader.get("sampler") is not None:
            problems += SAMPLERS.check(loader["sampler"], f"{path}.sampler")
            if loader.get("shuffle") is not None:
                problems.append(f"{path}.shuffle: a sampler says what comes when; leave shuffle out.")
        if isinstance(data.get(phase), dict):
            problems += DATASETS.check(data[phase], f"cfg.data.{phase}")
    return problems


def _component(registry: Registry, section: type, cfg: Mapping[str, Any], key: str) -> list[str]:
    if not isinstance(cfg.get(key), dict) or is_several(cfg[key]):
        return []
    entry, path = _dict(cfg[key]), f"cfg.{key}"
    problems = registry.check(entry, path, keys=parameters(section).types)
    problems += _check_mapping(registry, entry, path)
    names = [str(n) for n in _list(entry.get("output_keys"))] if section is Model else []
    return problems + [f"{path}.output_keys: '{n}' is there twice." for n in dict.fromkeys(names) if names.count(n) > 1]


def _check_mapping(registry: Registry, entry: dict[str, Any], path: str) -> list[str]:
    """Whether `forward` has the parameters that `mapping` names, where that can be seen without building."""
    mapping = _dict(entry.get("mapping"))
    if not mapping or "type" not in entry:
        return []
    try:
        built = registry.get(entry["type"])
    except ConfigError:  # reported by registry.check
        return []
    return bind(built, mapping, path).check() if has_forward(built) else []


def _hooks(hooks: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, path, entry) of each hook; a list names its entries by `name`, else by the type: "EMAHook" is "ema"."""
    for name, entry in _dict(hooks).items():
        yield str(name), f"cfg.hooks.{name}", entry
    for i, entry in enumerate(_list(hooks)):
        type_ = _dict(entry).get("type", str(i))
        short = short_name(type_).removesuffix("Hook").lower()
        plain = {k: v for k, v in _dict(entry).items() if k != "name"} if isinstance(entry, dict) else entry
        yield str(_dict(entry).get("name", short)), f"cfg.hooks.{i}", plain


def _check_hooks(hooks: Any) -> list[str]:
    problems: list[str] = []
    seen: dict[str, str] = {}
    for name, path, entry in _hooks(hooks):
        problems += HOOKS.check(entry, path, keys=parameters(Switch).types)
        if name in seen:
            problems.append(f"{path}: the hook at {seen[name]} is called '{name}' too.\n  Give one of them another `name`.")
        seen[name] = path
    return problems


def _check_resume(cfg: Mapping[str, Any]) -> list[str]:
    """A checkpoint to start from is given where a hook reads it, and is the only thing to start from."""
    entries = [
        _dict(entry) for _, _, entry in _hooks(cfg.get("hooks")) if short_name(_dict(entry).get("type", "")) == "ResumeHook"
    ]
    problems: list[str] = []
    if cfg.get("resume_from") is not None and not entries:
        problems.append("cfg.resume_from: no hook reads it. Add hooks.resume=dict(type='ResumeHook').")
    if _dict(cfg.get("model")).get("init") and any(e.get("resume_from") or cfg.get("resume_from") for e in entries):
        problems.append("cfg.model.init: resume_from starts from a whole checkpoint, with its weights. Leave one of them out.")
    return problems


def _workflow(cfg: Mapping[str, Any]) -> list[Any]:
    if cfg.get("workflow") is not None:
        return _list(cfg["workflow"])
    data = _dict(cfg.get("data"))
    return [{"phase": p} for p in ("train", "val") if data.get(p) is not None]


def _check_workflow(cfg: Mapping[str, Any]) -> list[str]:
    hooks = {name: dict[str, Any] for name, _, _ in _hooks(cfg.get("hooks"))}
    keys = parameters(Phase).joined(Parameters(hooks, ()))
    problems: list[str] = [] if _workflow(cfg) else ["cfg.workflow: there is no phase to run."]
    for i, entry in enumerate(map(_dict, _workflow(cfg))):
        path = f"cfg.workflow.{i}"
        problems += check_arguments(keys, entry, path, "a phase", path)
        for hook in hooks:
            problems += _section(Switch, entry.get(hook), f"{path}.{hook}")
        problems += _check_needs(entry.get("phase"), cfg, path)
    phases = [p for p in (_dict(e).get("phase") for e in _workflow(cfg)) if p in PHASES]
    return problems + [
        f"cfg.workflow: the phase '{p}' is there {phases.count(p)} times.\n  An epoch runs a phase once; total_epochs repeats."
        for p in dict.fromkeys(phases)
        if phases.count(p) > 1
    ]


def _check_needs(phase: Any, cfg: Mapping[str, Any], path: str) -> list[str]:
    """What a phase needs of the rest of the cfg."""
    lacking: list[str] = []
    if phase in PHASES and isinstance(cfg.get("data"), dict) and cfg["data"].get(phase) is None:
        lacking.append(f"cfg.data.{phase}")
    if phase == "train" and cfg.get("optimizer") is None:
        lacking.append("cfg.optimizer")
    return [f"{path}: the phase '{phase}' needs {need}, which is not there." for need in lacking]
