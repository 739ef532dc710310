"""The cfg file: load it, apply overrides `a.b.c=value`, and take a snapshot without secrets."""

from __future__ import annotations

import ast
import enum
import importlib.util
import math
import os
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ailab.errors import AilabError, ConfigError, nearest
from ailab.signature import name_list


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Execute a cfg file, and return its `cfg` with the overrides applied.

    The file runs like a script: its folder comes first on `sys.path`. It becomes a module under its own name, so that worker
    processes can unpickle the classes in it.

    Args:
        path: of a Python file that defines a dict `cfg`.
        overrides: see `override`.

    Raises:
        ConfigError: the file is missing, raises, or defines no dict `cfg`; or an override does not fit.
    """
    file = Path(path)
    if not file.is_file():
        near = [f.name for f in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConfigError(f"there is no cfg file {str(path)!r}.{nearest(file.name, near)}")
    module = _executed(file)
    if not hasattr(module, "cfg"):
        raise ConfigError(f"{path} defines no `cfg`.\n  It has to contain: cfg = dict(model=dict(type=...), data=...)")
    cfg: Any = module.cfg
    if not isinstance(cfg, dict):
        raise ConfigError(f"{path}: `cfg` has to be a dict, got {type(cfg).__name__}.")
    return override(cast("dict[str, Any]", cfg), overrides)


def _executed(file: Path) -> types.ModuleType:
    resolved = file.resolve()
    name = _module_name(resolved)
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(resolved.parent)
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        source = importlib.util.decode_source(resolved.read_bytes())
        exec(
            compile(source, str(resolved), "exec"), module.__dict__
        )  # not by import: its cache does not see a change within a second
    except Exception as e:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise ConfigError(_failure(file, resolved, e)) from e
    return module


def _module_name(file: Path) -> str:
    """The name of the file, with a prefix if another module has that name."""
    holder = sys.modules.get(file.stem)
    ours = holder is None or str(getattr(holder, "__file__", None)) == str(file)
    return file.stem if ours and file.stem.isidentifier() else "ailab_cfg_" + re.sub(r"\W", "_", file.stem)


def _failure(file: Path, resolved: Path, e: Exception) -> str:
    """The error and the line of the cfg file, without a traceback."""
    line = e.lineno if isinstance(e, SyntaxError) and e.filename == str(resolved) else None
    trace = e.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(resolved):
            line = trace.tb_lineno
        trace = trace.tb_next
    said = e.msg if isinstance(e, SyntaxError) else str(e)
    where = f"{file}, line {line}" if line else str(file)
    return f"{where}: {said}" if isinstance(e, AilabError) else f"{where}: {type(e).__name__}: {said}"


def copy_containers(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples. The objects in them are shared, not copied."""
    if isinstance(value, dict):
        return {k: copy_containers(v) for k, v in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(copy_containers(v) for v in value)
    return value


def override(cfg: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `cfg` with the overrides applied in order: `"optimizer.lr=3e-4"`, `"workflow.0.iters=5"`, ...

    A value is a Python literal, or else a string. Only the last key may be new. A section of the cfg that is missing, such as
    `dist` in `dist.sync=graph`, is created. A new hook must be a dict with a `type`.

    Raises:
        ConfigError: an override is malformed, or its path does not exist.
    """
    result = copy_containers(dict(cfg))
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {item!r}: write key=value, e.g. optimizer.lr=3e-4")
        result = _replaced(result, keys, _literal(text.strip()), "cfg")
    return result


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# Sections that a cfg may leave out. An override of a key in one of them creates it.
_SECTIONS = {"cfg.dist", "cfg.compile", "cfg.hooks", *(f"cfg.data.{p}_dataloader" for p in ("train", "val", "test"))}


def _replaced(node: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """A copy of `node` with `value` at the path `keys`."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, dict):
        known = cast("dict[str, Any]", node)
        is_hook = isinstance(value, dict) and "type" in value
        if key not in known and rest and f"{path}.{key}" in _SECTIONS:
            known = {**known, key: {}}
        if key not in known and (rest or (path == "cfg.hooks" and not is_hook)):
            hint = "\n  A new hook is a dict: hooks.NAME={'type': 'EMAHook'}" if path == "cfg.hooks" and not rest else ""
            raise ConfigError(f"{path} has no '{key}'.{nearest(key, known)} It has: {name_list(known) or 'nothing'}.{hint}")
        return {**known, key: _replaced(known.get(key), rest, value, f"{path}.{key}")}
    if isinstance(node, (list, tuple)):
        was = cast("list[Any] | tuple[Any, ...]", node)
        items = list(was)
        if not key.isdecimal() or int(key) >= len(items):
            raise ConfigError(f"{path} is a {type(was).__name__} of {len(items)}; '{key}' is no index of it.")
        items[int(key)] = _replaced(items[int(key)], rest, value, f"{path}.{key}")
        return type(was)(items)
    raise ConfigError(f"{path} is {type(node).__name__} {node!r}; it has no '{key}' to set.")


_FEW = 4096  # numbers of a tensor that a snapshot holds
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_ALWAYS = re.compile(r"secrets?|passw.*|passphrases?|pwd|creds?|credentials?|cookies?|auth|authorization|bearer|apikeys?")
_GUARDED = {"api", "access", "private", "auth", "license", "encryption", "signing", "ssh"}  # before `keys`, these make a secret
_HARMLESS = {  # before `_key` or `_token`, these make no secret
    *("monitor", "metric", "output", "input", "target", "label", "image", "mask", "text", "loss", "sort", "group", "index"),
    *("state", "field", "dict", "cache", "primary", "foreign", "public", "pad", "cls", "unk", "bos", "eos", "sep", "class"),
    *("start", "end", "stop", "special"),
}


def is_secret(key: str) -> bool:
    """Whether the name of a key means a secret: `wandb_api_key` does, `monitor_key` does not."""
    words = [w.lower() for w in _WORD.findall(key)]
    if any(_ALWAYS.fullmatch(w) for w in words):
        return True
    *front, last = words or [""]
    if last in ("key", "token"):
        return not front or front[-1] not in _HARMLESS
    return last in ("keys", "tokens") and bool(front) and front[-1] in _GUARDED


def snapshot(cfg: Any) -> Any:
    """A copy of a cfg for JSON, without secrets.

    Objects become their qualified names. Tensors and arrays become lists, large ones their shape and dtype. Non-finite floats
    become strings. The value of a key that names a secret becomes "***", also in the query of a URL; the user and password of a
    URL are removed.
    """
    if isinstance(cfg, Mapping):
        items = cast("Mapping[Any, Any]", cfg).items()
        return {str(k): "***" if is_secret(str(k)) and _may_be_secret(v) else snapshot(v) for k, v in items}
    if isinstance(cfg, (set, frozenset)):
        return sorted(map(snapshot, cast("set[Any]", cfg)), key=str)
    if isinstance(cfg, (list, tuple)):
        return [snapshot(v) for v in cast("Sequence[Any]", cfg)]
    if isinstance(cfg, (str, os.PathLike)):
        return _without_secrets(str(cast("Any", cfg)))
    return _scalar(cfg)


def _may_be_secret(value: Any) -> bool:
    """Whether a value can be a secret. A bool, a float, a function and an empty value cannot."""
    return not (value is None or isinstance(value, (bool, float)) or value == "" or callable(value))


def _without_secrets(text: str) -> str:
    """A string without the user, the password and the secret query parameters of a URL."""
    text = re.sub(r"([A-Za-z][\w+.-]*://)[^/\s?#]*@", r"\1", text)
    return re.sub(r"([?&;])([\w.-]+)=([^&;#\s]+)", lambda m: f"{m[1]}{m[2]}=***" if is_secret(m[2]) else m[0], text)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return f"{_qualified(type(value))}.{value.name}"
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if math.prod(value.shape) <= _FEW and hasattr(value, "tolist") and not getattr(value, "is_meta", False):
            return snapshot(value.tolist())
        return f"{type(value).__name__}(shape={tuple(value.shape)}, dtype={value.dtype})"
    return _qualified(value if hasattr(value, "__qualname__") else type(value))


def _qualified(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"
