"""The fingerprint of a rank: short texts about the cfg, the code and the data. It must be the same on every rank."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import ailab
from ailab import tree

_HASHED = 1 << 20  # elements of a tensor that are hashed in full
_SHOWN = 60  # characters: a longer value is hashed, so that a message can quote it


def of_cfg(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of a cfg: {path: value} for each value, and the versions of torch, Python and ailab's source."""
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    return {**versions, "source of ailab": _package(), **dict(_values(cfg, "cfg"))}


def of_parts(
    parts: Mapping[str, Any], datasets: Mapping[str, Any], params: Mapping[str, Tensor], sample: Any
) -> dict[str, str]:
    """The fingerprint of what was built: source files, dataset sizes, parameter shapes and dtypes, the first samples.

    Floating point values may differ in the last digits between machines. So only their mean and standard deviation count,
    to three digits.

    Args:
        parts: components by name; the file that defines the class of each is hashed.
        datasets: by name; the length of each counts.
        params: the parameters of the model by name.
        sample: a tree with the first samples.
    """
    found = {f"source of {name}": text for name, part in parts.items() if (text := _source(type(part)))}
    found |= {name: f"{len(data)} samples" for name, data in datasets.items() if hasattr(data, "__len__")}
    found["cfg.model"] = f"parameters {_hash(repr([(n, tuple(p.shape), p.dtype) for n, p in params.items()]))}"
    found["first samples"] = _hash(repr([(n, _content(v)) for n, v in tree.items(sample)]))
    return found


def of_value(value: Any) -> str:
    """A value as a short text that differs where the value does; of large tensors three parts are looked at.

    1 and 1.0 are one value.
    """
    if isinstance(value, functools.partial):
        held: Any = {"": value.func, "args": value.args, **value.keywords}
        return f"partial({', '.join(f'{n}={of_value(v)}' for n, v in tree.items(held))})"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} (hash {_hash_of(value)})"
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        if not value.shape:
            return of_value(value.item())
        return f"{value.dtype} {value.shape} (hash {hashlib.sha256(value.tobytes()).hexdigest()[:8]})"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = _describe(value)
    if text != f"a {type(value).__qualname__}" or type(value).__repr__ is object.__repr__:
        return text
    said = repr(value)  # of a dtype, an enum, a dataclass, a module: what it is made of
    return text if " at 0x" in said else said if len(said) <= _SHOWN else f"{text} (hash {_hash(said)})"


def of_code(*classes: Callable[..., Any]) -> str:
    """A hash of the source of classes and functions, one by one, that are neither ailab's nor of a library; "" for none."""
    texts = [_own_source(cls) for cls in classes]
    return _hash("".join(texts)) if any(texts) else ""


def _own_source(cls: Callable[..., Any]) -> str:
    if str(getattr(cls, "__module__", "")).partition(".")[0] == "ailab" or not _source(cls):
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _hash_of(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided:
        return "?"
    flat = tensor.detach().cpu().reshape(-1)
    size, part = flat.numel(), _HASHED // 3
    if size > _HASHED:
        flat = torch.cat([flat[at : at + part] for at in (0, (size - part) // 2, size - part)])
    return hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:8]


def _values(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from _values(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)) and value:
        for i, item in enumerate(cast("list[Any]", value)):
            yield from _values(item, f"{path}.{i}")
    else:
        yield path, _describe(value)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {_hash(repr(_content(value)))}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, (bool, int, float, str, Path, list, tuple, dict)):
        text = repr(str(value) if isinstance(value, Path) else value)
        return text if len(text) <= _SHOWN else f"{text[:20]}... (hash {_hash(text)})"
    return f"a {type(value).__qualname__}"


def _content(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _describe(value)
    value = value.detach().cpu()
    if not value.is_floating_point() or value.numel() < 2:
        return str(value.dtype), tuple(value.shape), hashlib.sha256(repr(value.tolist()).encode()).hexdigest()
    spread, mean = torch.std_mean(value.double())
    return str(value.dtype), tuple(value.shape), f"{float(mean):.2e}", f"{float(spread):.2e}"


def _source(cls: Callable[..., Any]) -> str:
    """The name of a class and a hash of the file that defines it; "" for a class of an installed library."""
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:
        return ""
    if file is None or "site-packages" in file or not Path(file).is_file():
        return ""
    return f"{cls.__qualname__} ({Path(file).name}, {_hash(Path(file).read_text())})"


@functools.cache
def _package() -> str:
    files = sorted(Path(str(ailab.__file__)).parent.rglob("*.py"))
    return _hash("".join(f"{f.name}\n{f.read_text()}" for f in files))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
