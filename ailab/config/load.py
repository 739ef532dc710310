"""The cfg file: executed once, changed by `a.b.c=value` overrides, and written down again without its secrets."""

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
    """The `cfg` that a Python file defines, with `overrides` applied.

    The file runs as a script would: its folder comes first on `sys.path`. It becomes a module under its own name, so that
    worker processes can unpickle the classes in it.

    Raises:
        ConfigError: when the file is missing, raises, or defines no dict `cfg`; or an override does not fit.
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
        exec(compile(source, str(resolved), "exec"), module.__dict__)  # not the import system: its cache looks at seconds
    except Exception as e:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise ConfigError(_failure(file, resolved, e)) from e
    return module


def _module_name(file: Path) -> str:
    """The file's own name, or a prefixed one where another module has that."""
    holder = sys.modules.get(file.stem)
    ours = holder is None or str(getattr(holder, "__file__", None)) == str(file)
    return file.stem if ours and file.stem.isidentifier() else "ailab_cfg_" + re.sub(r"\W", "_", file.stem)


def _failure(file: Path, resolved: Path, e: Exception) -> str:
    """What went wrong and in which line of the cfg file, without a traceback."""
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
    """The same dicts, lists and tuples anew, around the same objects."""
    if isinstance(value, dict):
        return {k: copy_containers(v) for k, v in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(copy_containers(v) for v in value)
    return value


def override(cfg: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `cfg` after `"optimizer.lr=3e-4"`, `"workflow.0.iters=5"`, ... in their order.

    A value is a Python literal, or else a string. Only the last key may be new, below the cfg's own sections, which need not be
    there (`dist.sync=graph`); and a new hook has to be a dict with a `type`.

    Raises:
        ConfigError: when one is malformed or leads nowhere.
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


# What a cfg may leave out; an override of what is in them makes them.
_SECTIONS = {"cfg.dist", "cfg.compile", "cfg.hooks", *(f"cfg.data.{p}_dataloader" for p in ("train", "val", "test"))}


def _replaced(node: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """`node` with another value at the end of `keys`."""
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


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_ALWAYS = re.compile(r"secrets?|passw.*|passphrases?|pwd|creds?|credentials?|cookies?|auth|authorization|bearer|apikeys?")
_GUARDED = {"api", "access", "private", "auth", "license", "encryption", "signing", "ssh"}  # what makes even `keys` secret
_HARMLESS = {  # what makes `..._key` a name and `..._token` a symbol
    *("monitor", "metric", "output", "input", "target", "label", "image", "mask", "text", "loss", "sort", "group", "index"),
    *("state", "field", "dict", "cache", "primary", "foreign", "public", "pad", "cls", "unk", "bos", "eos", "sep", "class"),
    *("start", "end", "stop", "special"),
}


def is_secret(key: str) -> bool:
    """Whether the value under a key of this name is to be kept to oneself: `wandb_api_key` is, `monitor_key` is not."""
    words = [w.lower() for w in _WORD.findall(key)]
    if any(_ALWAYS.fullmatch(w) for w in words):
        return True
    *front, last = words or [""]
    if last in ("key", "token"):
        return not front or front[-1] not in _HARMLESS
    return last in ("keys", "tokens") and bool(front) and front[-1] in _GUARDED


def snapshot(cfg: Any) -> Any:
    """A copy of a cfg that JSON can hold and that others may read.

    Objects become their qualified names, tensors and arrays their shape and dtype, non-finite floats strings. Secrets, by the
    name of their key, in URLs too, become "***".
    """
    if isinstance(cfg, Mapping):
        items = cast("Mapping[Any, Any]", cfg).items()
        return {str(k): "***" if is_secret(str(k)) and _holds(v) else snapshot(v) for k, v in items}
    if isinstance(cfg, (set, frozenset)):
        return sorted(map(snapshot, cast("set[Any]", cfg)), key=str)
    if isinstance(cfg, (list, tuple)):
        return [snapshot(v) for v in cast("Sequence[Any]", cfg)]
    if isinstance(cfg, (str, os.PathLike)):
        return _without_secrets(str(cast("Any", cfg)))
    return _scalar(cfg)


def _holds(value: Any) -> bool:
    """Whether a value can be a secret; a switch, a count in steps or nothing at all cannot."""
    return not (value is None or isinstance(value, (bool, float)) or value == "" or callable(value))


def _without_secrets(text: str) -> str:
    """A string without the user and password of a URL and without the secrets of its query."""
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
        return f"{type(value).__name__}(shape={tuple(value.shape)}, dtype={value.dtype})"
    return _qualified(value if hasattr(value, "__qualname__") else type(value))


def _qualified(obj: Any) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"
