"""What a run is made of, by section, for the manifest of each checkpoint; and what of it has changed since."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ailab import tree
from ailab.config.load import snapshot
from ailab.datasets.files.image import ImageSettings
from ailab.datasets.stream.loading import BatchKey, Fetcher, SampleSettings
from ailab.dist import fingerprint
from ailab.errors import ConfigError
from ailab.registry import DATASETS, HOOKS, LOSSES, MODELS, OPTIMIZERS, Registry
from ailab.types import RunInfo

_SPEED = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context"}
_LISTED = 32  # entries of a list that are compared one by one; a longer one is a hash
_GIVEN = {"run", "name", "self", "params"}  # arguments that come from the framework
STEPS = "training steps of an epoch"


def of_run(
    run: RunInfo, roles: Mapping[str, str], model: nn.Module, datasets: Mapping[str, Any], compiled: str
) -> dict[str, Any]:
    """The fingerprint of a run: texts by key, in sections.

    "results": what the results depend on: the cfg with all its defaults, and the data. "end": when it ends. "code": the source of
    the user's own components. "bits": what changes no more than the last digits. Observers, workers, intervals and paths are in
    none. Secrets of the cfg are "***".

    Args:
        run: the facts of the run.
        roles: of the hooks of the cfg that are on, by name: "result", "end" or "observer".
        model: the user's module.
        datasets: by phase.
        compiled: what is compiled, and how gradients are synchronised.
    """
    cfg, results = run.cfg, [n for n, role in roles.items() if role == "result"]
    found: dict[str, Any] = {"seed": cfg["seed"], "model": _completed(MODELS, cfg["model"])}
    found |= {"loss": _completed(LOSSES, cfg["loss"]), "optimizer": _completed(OPTIMIZERS, cfg["optimizer"])}
    found["data"] = _data(cfg, run)
    found["workflow"] = {p["phase"]: {k: v for k, v in p.items() if k == "iters" or k in results} for p in cfg["workflow"]}
    found["hooks"] = {n: _completed(HOOKS, cfg["hooks"][n]) for n in results}
    texts = {"order of cfg.workflow": ", ".join(run.phase_steps), "order of cfg.hooks": ", ".join(results)}
    texts |= {f"samples of cfg.data.{phase}": _samples(dataset, cfg) for phase, dataset in datasets.items()}
    ends = {"total_epochs": cfg["total_epochs"], "hooks": {n: cfg["hooks"][n] for n, role in roles.items() if role == "end"}}
    return {
        "results": {**dict(_flat(found, "cfg")), **texts, STEPS: str(run.steps_per_epoch)},
        "end": dict(_flat(ends, "cfg")),
        "code": _code(cfg, results, model, datasets),
        "bits": _bits(run, compiled),
        "slots": {slot: list(where) for slot, where in run.slots.items()},  # whose memory is in the state, and its role
        "accepted": [],  # [step, [changes]] of each time that the run went on with a changed cfg
    }


def _bits(run: RunInfo, compiled: str) -> dict[str, str]:
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    threads, processes = str(torch.get_num_threads()), str(run.world_size)
    return {"torch": str(torch.__version__), "device": device, "threads": threads, "processes": processes, "compile": compiled}


def _code(cfg: Mapping[str, Any], hooks: Sequence[str], model: nn.Module, datasets: Mapping[str, Any]) -> dict[str, str]:
    modules = sorted({type(m) for m in model.modules()}, key=lambda cls: cls.__qualname__)
    found = {"cfg.model": fingerprint.of_code(*modules)}
    found |= {f"cfg.data.{phase}": fingerprint.of_code(type(dataset)) for phase, dataset in datasets.items()}
    entries = {"cfg.loss": (LOSSES, cfg["loss"]), "cfg.optimizer": (OPTIMIZERS, cfg["optimizer"])}
    entries |= {f"cfg.hooks.{n}": (HOOKS, cfg["hooks"][n]) for n in hooks}
    found |= {path: fingerprint.of_code(registry.get(entry["type"])) for path, (registry, entry) in entries.items() if entry}
    return {path: text for path, text in found.items() if text}


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line `key: old -> new` for each difference of a section."""
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return [f"{k}: {old.get(k, 'nothing')} -> {new.get(k, 'nothing')}" for k in keys]


def _data(cfg: Mapping[str, Any], run: RunInfo) -> dict[str, Any]:
    """What of `cfg.data` decides which samples the phases of this run see."""
    data: Mapping[str, Any] = cfg["data"]
    found: dict[str, Any] = {"truncated": data["truncated"], "nan_is_bad": data["nan_is_bad"]}
    for phase in run.phase_steps:
        loader = {k: v for k, v in data[f"{phase}_dataloader"].items() if k not in _SPEED}
        loader["shuffle"] = phase == "train" if loader["shuffle"] is None else loader["shuffle"]
        found |= {phase: _completed(DATASETS, data[phase]), f"{phase}_dataloader": loader}
    return found


def _completed(registry: Registry, entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An entry with the defaults of what it names, so that a default that is written out is no change."""
    if entry is None:
        return None
    try:
        given = inspect.signature(registry.get(entry["type"])).parameters.values()
    except (ConfigError, TypeError, ValueError):
        return entry
    empty = inspect.Parameter.empty
    return {**{p.name: p.default for p in given if p.default is not empty and p.name not in _GIVEN}, **entry}


def _flat(value: Any, path: str, key: str = "") -> Iterator[tuple[str, str]]:
    """A nested cfg as texts by path."""
    if isinstance(value, Mapping) and value:
        for name, item in cast("Mapping[Any, Any]", value).items():
            yield from _flat(item, f"{path}.{name}", str(name))
    elif isinstance(value, (set, frozenset)):
        yield from _flat(sorted(cast("set[Any]", value), key=str), path, key)
    elif isinstance(value, (list, tuple)) and value:
        items = cast("list[Any]", value)
        texts = [text for i, item in enumerate(items) for text in _flat(item, f"{path}.{i}", key)]
        if len(items) <= _LISTED:
            yield from texts
        else:
            yield path, f"{len(items)} entries (hash {_hash(repr(texts))})"
    else:
        shown = snapshot({key: value})[key]  # without secrets
        yield path, fingerprint.of_value(shown if shown == "***" or isinstance(value, (str, Path)) else value)


def _samples(dataset: Any, cfg: Mapping[str, Any]) -> str:
    """How many there are, and a hash of the first, the middle and the last one: twice, for some draw anew each time."""
    size = len(dataset)
    read = _reader(dataset, cfg)
    first, second = ([read(i) for i in dict.fromkeys((0, size // 2, size - 1))] for _ in range(2))
    return f"{size}, content {_hash(repr(first))}" if first == second else f"{size}, of random content"


def _reader(dataset: Any, cfg: Mapping[str, Any]) -> Callable[[int], str]:
    """The content of one sample as text, read as the run reads it, under a seed of its own."""
    data: Mapping[str, Any] = cfg["data"]
    images = ImageSettings(data["truncated"], None)
    settings = SampleSettings(0, lambda samples: {"sample": samples[0]}, data["nan_is_bad"], images)
    fetcher = Fetcher(dataset, settings, None, 1)

    def read(index: int) -> str:
        loaded = fetcher[BatchKey(0, [index], index)]
        return repr([bad.kind for bad in loaded.bad] or [(n, fingerprint.of_value(v)) for n, v in tree.items(loaded.batch)])

    return read


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
