"""`cfg.model.init`: the first weights of a model, from a checkpoint of another run or from a file of a state_dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ailab.errors import ConfigError, nearest
from ailab.workdir import checkpoint

PATH = "cfg.model.init"
_NESTS = ("model_state", "state_dict", "model", "model_state_dict", "module")  # where trainers put a state_dict in their files
_SHOWN = 6  # names that a row of the table lists


def init_model(model: nn.Module, init: Mapping[str, Any]) -> list[str]:
    """Copy the weights that a completed `cfg.model.init` names into a model, and return what was done, as the lines of a table.

    Values take the dtype and the device of the model's own. A tensor that has two names needs one of them.

    Raises:
        ConfigError: when the file cannot be read, a pattern matches nothing, or nothing fits; and under `strict`, when a tensor of
            the model is missing in the file, one of the file is not in the model, or the shapes of two differ.
    """
    found, where = _read(Path(init["from_"]))
    try:
        found = checkpoint.remove_module_prefix(found)
        found = checkpoint.get_target_module_state(found, init["part"]) if init["part"] else found
    except ConfigError as e:
        raise ConfigError(f"{PATH}: {where}: {e}") from e
    found = _renamed(found, init["rename"])
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    skipped = _skipped([*own, *found], init["skip"])
    wanted = {n: t for n, t in found.items() if n not in skipped}
    other = {n: f"{n} {_kind(t)} for {_kind(own[n])}" for n, t in wanted.items() if n in own and not _fits(own[n], t)}
    fits = {n: t for n, t in wanted.items() if n not in other}
    result = model.load_state_dict(fits, strict=False)
    loaded = {id(t) for n, t in own.items() if n in fits}
    rows = {
        "matched": [n for n in fits if n not in result.unexpected_keys],
        "skipped": [n for n in own if n in skipped],
        "missing": [n for n in result.missing_keys if n not in skipped and n not in other and id(own.get(n)) not in loaded],
        "left over": result.unexpected_keys,
        "other shape": list(other.values()),
    }
    table = [f"weights   {where}", *(_row(name, names) for name, names in rows.items() if names)]
    if not rows["matched"] or (init["strict"] and any(rows[name] for name in ("missing", "left over", "other shape"))):
        what = "not every tensor fits" if rows["matched"] else "nothing fits"
        raise ConfigError(
            f"{PATH}: {what}. Missing is what the file has not, left over is what the model has not.\n"
            + "\n".join(table)
            + "\n"
            "  part= and rename={'old.*': 'new.*'} bring names together. skip=['head.*'] leaves tensors as they are,\n"
            "  and strict=False all that do not fit."
        )
    return table


def _fits(own: Tensor, found: Tensor) -> bool:
    """Whether a value can be copied: floats of any width to floats, but no integers (a quantized file) to floats."""
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (own, found)]
    return own.shape == found.shape and kinds[0] == kinds[1]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _row(name: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {name:<12}{len(names):>5}  {', '.join(names[:_SHOWN])}{more}"


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state_dict at a path, on the CPU, and what was read, in words. Nothing in a file is executed.

    Args:
        path: the folder of a checkpoint; a folder of checkpoints, or the work_dir that has one (the newest is taken); a file of
            `torch.save`, of a state_dict or of a dict that holds one; or a file of safetensors.

    Raises:
        ConfigError: when there is no such thing, or it is something else.
        CheckpointError: when a checkpoint is damaged.
    """
    if path.is_dir():
        return _of_checkpoint(path)
    load_file = _safetensors(path) if path.suffix == ".safetensors" else None
    try:
        content = load_file(path) if load_file else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ConfigError(f"{PATH}.from_: {path} cannot be read: {e.strerror or e}.") from e
    except Exception as e:  # bytes that are no such file raise errors of many classes; there is no second, less safe attempt
        what = str(e).partition("\n")[0][:200]
        raise ConfigError(
            f"{PATH}.from_: {path} is no file of tensors alone: {type(e).__name__}: {what}\n"
            "  What is safe to read: torch.save(model.state_dict(), file). Files that hold code are refused."
        ) from e
    return _state_dict(content, path), str(path)


def _of_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    if (found := checkpoint.find(path)) is None:
        raise ConfigError(f"{PATH}.from_: {path} is no checkpoint, and there is none in it.")
    content, saved = checkpoint.load(found)
    return content["model_state"], f"{found} (step {saved.step})"


def _safetensors(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise ConfigError(f"{PATH}.from_: {path} needs the package safetensors: pip install 'ailab[weights]'.") from e
    return load_file


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict, or of the one that a trainer's file holds."""
    if isinstance(content, Mapping):
        named = cast("Mapping[Any, Any]", content)
        for nest in (*(named.get(key) for key in _NESTS), named):  # a trainer's file may have a tensor or two at its top
            if isinstance(nest, Mapping) and (tensors := _tensors(cast("Mapping[Any, Any]", nest))):
                return tensors
        what = f"a dict with {', '.join(map(str, list(named)[:8]))}"
    else:
        what = f"a {type(content).__name__}"
    raise ConfigError(
        f"{PATH}.from_: {path} holds {what}, and no state_dict at its top or under {', '.join(_NESTS)}.\n"
        "  Save one: torch.save(model.state_dict(), file)."
    )


def _tensors(named: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {n: t for n, t in named.items() if isinstance(n, str) and isinstance(t, Tensor)}


def _renamed(found: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """The entries under new names. The first pattern that matches the whole of a name renames it."""
    rules = [(_pattern(old), new.split("*"), old) for old, new in rename.items()]
    for pattern, texts, old in rules:
        if len(texts) - 1 != pattern.groups:
            raise ConfigError(f"{PATH}.rename: {old!r} -> {'*'.join(texts)!r}: as many * on both sides.")
        if not any(pattern.fullmatch(n) for n in found):
            raise ConfigError(f"{PATH}.rename: no tensor of the file matches {old!r}.{nearest(old, found)}")

    def new_name(name: str) -> str:
        for pattern, texts, _ in rules:
            if match := pattern.fullmatch(name):
                return "".join(a + b for a, b in zip(texts, [*match.groups(), ""], strict=True))
        return name

    names = {n: new_name(n) for n in found}
    taken: dict[str, str] = {}
    for old, new in names.items():
        if taken.setdefault(new, old) != old:
            raise ConfigError(f"{PATH}.rename: {taken[new]!r} and {old!r} would both be {new!r}.")
    return {names[n]: t for n, t in found.items()}


def _skipped(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that a pattern matches."""
    names = dict.fromkeys(names)
    found: set[str] = set()
    for i, text in enumerate(patterns):
        hit = {n for n in names if _pattern(text).fullmatch(n)}
        if not hit:
            raise ConfigError(f"{PATH}.skip[{i}]: no tensor of the model or the file matches {text!r}.{nearest(text, names)}")
        found |= hit
    return found


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in text.split("*")))
