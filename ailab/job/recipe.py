"""What a model is, as plain data: how it is built, how its inputs are read, and what its outputs are called.

It is `model.json` in the folder of each checkpoint, so that a model can be used without its training data and its optimizer.
Nothing in it is executed: names are looked up in the registries, and a dotted path is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ailab.binding import Binding, bind
from ailab.config.load import is_secret
from ailab.config.schema import Model
from ailab.datasets.inputs import check_reading
from ailab.datasets.transforms.pipeline import check_transform
from ailab.errors import CheckpointError, ConfigError
from ailab.job.build import Parts, explained
from ailab.registry import DATASETS, MODELS, TRANSFORMS, Registry
from ailab.signature import name_of, parameters

FORMAT = 1  # a reader refuses a higher one
_PHASES = ("val", "test", "train")  # whose preprocessing is taken, the first that there is
_READ = ("transform", "resize", "size_hint")  # arguments of a dataset that say how an image is read
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "model": dict,
    "mapping": dict,
    "output_keys": list,
    "fields": dict,
    "outputs": list,
    "reading": dict,
    "classes": (list, type(None)),
    "task": str,
    "missing": list,
}


@dataclass(frozen=True)
class Recipe:
    """How to build a model and to read its inputs."""

    model: dict[str, Any]  # dict(type=..., **arguments)
    mapping: dict[str, str]  # {parameter of forward: field}
    output_keys: list[str]
    fields: dict[str, dict[str, Any]]  # what the model reads: {field: {"shape": of one sample, "dtype": name}}
    outputs: list[str]  # names of the model's outputs; the one that the loss compares with the target is the first
    reading: dict[str, Any]  # arguments of `InputDataset`, without its items
    classes: list[str] | None = None
    task: str = "values"  # what the outputs are: "classes", "class map", "boxes" or "values"
    missing: list[str] = field(default_factory=list[str])  # places of the cfg that are no plain data: they come from the cfg
    phase: str = "val"  # whose dataset `reading` is of
    format: int = FORMAT

    def to_json(self) -> bytes:
        """The recipe as the bytes of model.json; the same for the same recipe."""
        return json.dumps(asdict(self), indent=1, allow_nan=False).encode() + b"\n"

    def build(self) -> nn.Module:
        """The model in evaluation mode, with its own first weights.

        Raises:
            ConfigError: the model cannot be built of these arguments.
        """
        model = explained(lambda: MODELS.build(self.model, "model.json: model"), "model.json: the model could not be built")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model.json: {self.model['type']} gives {type(model).__name__}, not a torch.nn.Module.")
        return model.eval()


def recipe_of(cfg: Mapping[str, Any], parts: Parts) -> Recipe:
    """The recipe of the model of a run.

    Args:
        cfg: completed.
        parts: of the run.
    """
    missing: list[str] = []
    phase = next(p for p in _PHASES if p in parts.datasets)
    entry = {k: v for k, v in cfg["model"].items() if k not in parameters(Model).types}
    model = _plain_entry(entry, "cfg.model", MODELS, missing)
    bound = bind(parts.model, cfg["model"]["mapping"], "cfg.model")
    fields = _fields(bound, parts.sample)
    reading = _reading(cfg["data"][phase], parts.datasets[phase], f"cfg.data.{phase}", fields, missing)
    compared = cfg["loss"]["mapping"].get("input") if cfg["loss"] else None
    outputs = sorted((n for n in parts.fields if n not in parts.sample), key=lambda n: n != compared)
    names = getattr(parts.datasets[phase], "classes", None)
    return Recipe(
        model,
        dict(cfg["model"]["mapping"]),
        list(cfg["model"]["output_keys"]),
        fields,
        outputs,
        reading,
        [str(n) for n in names] if names else None,
        _task(cfg, parts.sample),
        missing,
        phase,
    )


def _task(cfg: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """What the outputs of the model are, by what the loss compares them with."""
    named = cfg["loss"]["mapping"].get("target") if cfg["loss"] else None
    label = next((sample[n] for n in (named, "target", "label", "mask") if n and isinstance(sample.get(n), Tensor)), None)
    if "boxes" in sample:
        return "boxes"
    if label is None or label.is_floating_point() or label.dtype == torch.bool:
        return "values"
    return {1: "classes", 3: "class map"}.get(label.dim(), "values")


def _fields(bound: Binding, sample: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a batch that the model reads, with shape and dtype of one sample."""
    names = [f for _, f in bound.mapped] + [next((f for f in some if f in sample), "") for _, some in bound.free]
    found = {n: sample[n] for n in dict.fromkeys(names) if isinstance(sample.get(n), Tensor)}
    return {n: {"shape": list(v.shape[1:]), "dtype": str(v.dtype).removeprefix("torch.")} for n, v in found.items()}


def _reading(
    entry: Mapping[str, Any], dataset: Any, path: str, fields: Mapping[str, Any], missing: list[str]
) -> dict[str, Any]:
    """How the inputs of a dataset are read. Of one that is not ailab's own only arrays can be read: its code is not known here."""
    cls: Any = DATASETS.get(entry["type"])
    own = f"{getattr(cls, '__module__', '')}.".startswith("ailab.")
    inner = getattr(dataset, "input_field", None)
    takes: Mapping[str, Any] = parameters(cls).types
    if not own or inner is None or "transform" not in takes:
        name = next(iter(fields), "input")
        return {"field": name, "image": False, "dtype": fields[name]["dtype"] if name in fields else None}
    outer = getattr(dataset, "renamed", {}).get(inner, inner)
    found: dict[str, Any] = {"field": outer, "image": True}
    for key in _READ:
        if entry.get(key) is not None:
            found[key] = _plain(entry[key], f"{path}.{key}", missing)
    return found


def _plain_entry(entry: Mapping[str, Any], path: str, registry: Registry, missing: list[str]) -> dict[str, Any]:
    """An entry of the cfg as plain data, with the registered name of an object that has one."""
    type_ = entry["type"]
    if not isinstance(type_, str):
        known = [n for n in registry.names() if registry.get(n) is type_]
        type_ = known[0] if known else None
    if type_ is None or "." in type_ or ":" in type_:
        missing.append(f"{path}.type")
        type_ = name_of(entry["type"]) if not isinstance(entry["type"], str) else entry["type"]
    return {"type": type_, **{k: _plain(v, f"{path}.{k}", missing) for k, v in entry.items() if k != "type"}}


def _plain(value: Any, path: str, missing: list[str]) -> Any:
    """A value as JSON holds it; None, and a line in `missing`, for what it cannot hold, or what may be a secret."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        secret = [f"{path}.{k}" for k in items if is_secret(str(k))]
        missing += secret
        if "type" in items:
            return _plain_entry({k: v for k, v in items.items() if not is_secret(str(k))}, path, TRANSFORMS, missing)
        return {str(k): _plain(v, f"{path}.{k}", missing) for k, v in items.items() if not is_secret(str(k))}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}.{i}", missing) for i, v in enumerate(cast("Sequence[Any]", value))]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    missing.append(path)
    return None


def read_recipe(data: bytes | None, where: Path, cfg: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of the bytes of model.json, checked: its form, its names against the registries, its arguments.

    Args:
        data: of model.json; None where the checkpoint has none.
        where: the folder of the checkpoint, for messages.
        cfg: of the run, where there is one. What is no plain data comes from it.

    Raises:
        CheckpointError: there is no recipe, it is of a newer format, or it is not one.
        ConfigError: a name is not registered, an argument does not fit, or what is no plain data is missing.
    """
    if data is None:
        raise CheckpointError(f"{where} has no model.json: an earlier ailab wrote it. Save it again: go on with its run.")
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: model.json cannot be parsed ({type(error).__name__}).") from error
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{where}: the format {version} of model.json is newer than {FORMAT}. Update ailab.")
    if not isinstance(found, dict) or not all(isinstance(found.get(k), kind) for k, kind in _NEEDED.items()):
        raise CheckpointError(f"{where}: model.json is not what ailab writes.")
    plain = {k: v for k, v in cast("dict[str, Any]", found).items() if k in Recipe.__dataclass_fields__}
    recipe = _completed(Recipe(**plain), where, cfg)
    if cfg is None or not recipe.missing:
        _refuse_dotted([recipe.model, recipe.reading], where)
    problems = MODELS.check(recipe.model, "model.json: model")
    problems += check_transform(recipe.reading.get("transform"), "model.json: reading.transform")
    if problems:
        hint = (
            "" if cfg else "\n  A model of yours is registered by the module that defines it: import it first, or give the cfg."
        )
        raise ConfigError("\n".join(problems) + hint)
    check_reading({k: v for k, v in recipe.reading.items() if k != "transform"}, "model.json: reading")
    return recipe


def _completed(recipe: Recipe, where: Path, cfg: Mapping[str, Any] | None) -> Recipe:
    """The recipe, with what is no plain data taken from the cfg."""
    if not recipe.missing:
        return recipe
    if cfg is None:
        places = ", ".join(map(str, recipe.missing[:4]))
        raise ConfigError(
            f"{where}: model.json cannot hold {places}: they are objects. Give the cfg too: Predictor(..., cfg=cfg)."
        )
    model = {k: v for k, v in cfg["model"].items() if k not in parameters(Model).types}
    entry = cfg["data"].get(recipe.phase) or {}
    reading = {**recipe.reading, **{k: entry[k] for k in _READ if recipe.reading.get("image") and entry.get(k) is not None}}
    return replace(recipe, model=model, reading=reading)


def _refuse_dotted(node: Any, where: Path) -> None:
    """Raise for a `type` that would import a module: a file that is read executes nothing."""
    if isinstance(node, Mapping):
        type_ = cast("Mapping[str, Any]", node).get("type", "")
        if not isinstance(type_, str) or "." in type_ or ":" in type_:
            raise CheckpointError(
                f"{where}: model.json names the type {type_!r:.80}; only registered names are looked up there."
            )
        node = list(cast("Mapping[str, Any]", node).values())
    if isinstance(node, list):
        for one in cast("list[Any]", node):
            _refuse_dotted(one, where)
