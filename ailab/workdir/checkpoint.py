"""Save and load checkpoints: a `TrainState`, and more, as plain dicts of CPU tensors that torch alone can read.

torch.load(path / "state.pt", weights_only=True)["model_state"]
"""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import AilabError, CheckpointError, ConfigError, NonFiniteError, nearest
from ailab.types import TrainState
from ailab.workdir import commit
from ailab.workdir.commit import Keep, find, has_any, newest, retain
from ailab.workdir.manifest import Checkpoint, read_checkpoint

__all__ = [
    "Checkpoint",
    "Keep",
    "find",
    "get_target_module_state",
    "has_any",
    "load",
    "newest",
    "remove_module_prefix",
    "restore",
    "retain",
    "save",
    "to_plain",
]
_PLAIN = (bool, int, float, str, type(None))  # exact types: a numpy float is a float, but weights_only refuses it
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and DataParallel, and of torch.compile


def to_plain(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts, lists and tuples. The tensors are shared, not copied.

    Raises:
        CheckpointError: a leaf is neither a tensor nor a bool, int, float, str or None.
    """
    return _plain(state, lambda tensor: tensor)


def save(
    directory: Path,
    content: Mapping[str, Any],
    *,
    step: int,
    epoch: int,
    fingerprint: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    model: bytes | None = None,
) -> Path:
    """Write a checkpoint, and return its folder once it is durable, that is, safe from a power failure.

    The same content gives the same bytes. A tensor that other entries share with `state` is stored once. A valid checkpoint of
    the same step and of the same or a later epoch is kept, and nothing is written. (A run that is stopped between the training
    and the evaluation of an epoch saves its last step twice: then the epoch is higher the second time.)

    Args:
        directory: the folder of all checkpoints; made if it is missing.
        content: plain values and tensors by name. It must have the entry `state`, from `to_plain`.
        step: training steps completed.
        epoch: epochs completed.
        fingerprint: what the run is, for the manifest.
        metrics: results, for the manifest. `retain` reads them.
        model: the bytes of model.json, which says what the model is. None: the checkpoint is without it.

    Raises:
        NonFiniteError: a parameter, an average of it, a running statistic or a tensor of the optimizer has a NaN or an infinity,
            or another buffer has a NaN. (A mask may hold -inf.) The first such tensor is named.
        CheckpointError: the content has a leaf that cannot be saved, or the files cannot be written. Older checkpoints are
            untouched.
    """
    try:
        if (path := commit.find_committed(directory, step, epoch)) is not None:
            return path
        _refuse_non_finite(content["state"])
        stored = _stored({**content, "epoch": epoch, "step": step})
        buffer = io.BytesIO()  # torch.save names the inner folder after a path, and hides the error of a full disk
        torch.save(stored, buffer)
        head = {"step": step, "epoch": epoch, "tree": _described(stored["state"]), "torch": torch.__version__}
        head |= {"fingerprint": fingerprint or {}, "metrics": metrics or {}}
        return commit.commit(directory, head, buffer.getbuffer(), model)
    except AilabError:
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{directory}: step {step} could not be saved: {error}") from error


def load(path: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Read and verify a checkpoint: its content, with tensors on the CPU, and its manifest. Nothing in the file is executed.

    Args:
        path: the folder of one checkpoint.

    Raises:
        DamagedError: the files are not as they were saved.
        CheckpointError: the files cannot be read, are refused, or have a newer format.
    """
    checkpoint, data = read_checkpoint(Path(path))
    try:
        _check_archive(data)
        content = _plain(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), _dense)
        described = _described(content["state"])
    except Exception as error:  # unknown bytes may raise anything; there is no second, less safe attempt
        raise CheckpointError(f"{path}: its state is refused ({type(error).__name__}). Use an older checkpoint.") from error
    if described != checkpoint.manifest["tree"]:
        raise CheckpointError(f"{path}: its state is not the one that its manifest describes. Use an older checkpoint.")
    return content, checkpoint


def restore(like: TrainState, saved: Any, words: Callable[[str], str] = str) -> TrainState:
    """A new state with the values of `saved`. Nothing is cast or broadcast.

    Args:
        like: a state of this run. It gives the devices and memory layouts.
        saved: the entry `state` of what `load` returns.
        words: what a path is called in the message.

    Raises:
        CheckpointError: a path, shape, dtype or type differs. The first 5 places are named.
    """
    if text := difference(like, saved, words):
        raise CheckpointError(text)
    wanted, found = dict(tree.items(like)), dict(tree.items(saved))

    def placed(path: str, leaf: Any) -> Any:
        return torch.empty_like(leaf).copy_(found[path]) if isinstance(leaf, Tensor) else found[path]

    return tree.unflatten(like, [placed(path, leaf) for path, leaf in wanted.items()])


def difference(like: Any, saved: Any, words: Callable[[str], str] = str) -> str:
    """The first 5 places where two trees differ, in the words for their paths; nothing where they fit."""
    if not (paths := misfits(like, saved)):
        return ""
    wanted, found = dict(tree.items(_plain(like, lambda t: t))), dict(tree.items(saved))
    lines = [f"  {ascii(words(p))[1:-1]}: checkpoint {_spec(found, p)}, run {_spec(wanted, p)}" for p in paths[:5]]
    return "\n".join([f"The checkpoint does not fit this run: {len(paths)} entries differ.", *lines])


def misfits(like: Any, saved: Any) -> list[str]:
    """The paths at which two trees differ in shape, dtype, type or presence."""
    wanted, found = dict(tree.items(_plain(like, lambda t: t))), dict(tree.items(saved))
    return [path for path in {**wanted, **found} if _spec(wanted, path) != _spec(found, path)]


def remove_module_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new state_dict without the prefixes of wrappers: "module." (DistributedDataParallel) and "_orig_mod." (torch.compile).

    If every name has "model." after "module.", that goes too: files of the first ailab have it.

    Raises:
        ConfigError: two names become the same.
    """
    short = {name: _unwrapped(name) for name in state_dict}
    if all(new.startswith("model.") and "module." in name.removesuffix(new) for name, new in short.items()):
        short = {name: _unwrapped(new.removeprefix("model.")) for name, new in short.items()}
    if len(set(short.values())) < len(short):
        raise ConfigError("remove_module_prefix: two names differ only in the prefix of a wrapper. Remove one of them.")
    return {short[name]: value for name, value in state_dict.items()}


def get_target_module_state(state_dict: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of one sub-module of a state_dict, with names as that module has them.

    Args:
        state_dict: of the whole module.
        name: the dotted name of the sub-module.

    Raises:
        ConfigError: the state_dict has no entry of that sub-module.
    """
    prefix = name + "."
    found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not found:
        offered = {".".join(key.split(".")[:n]) for key in state_dict for n in range(1, key.count(".") + 1)}
        raise ConfigError(f"The state_dict has no sub-module {name!r}.{nearest(name, offered)}")
    return found


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _plain(node: Any, leaf: Callable[[Tensor], Tensor], path: str = "") -> Any:
    """A tree as new dicts, lists and tuples. Strings are interned, so that the pickled bytes depend on the values alone."""
    if isinstance(node, Tensor):
        return leaf(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        node = cast("Any", {f.name: getattr(node, f.name) for f in dataclasses.fields(node)})
    if isinstance(node, dict):
        entries = cast("dict[Any, Any]", node).items()
        return {_plain(key, leaf, f"{path}[key]"): _plain(value, leaf, f"{path}.{key}") for key, value in entries}
    if isinstance(node, (list, tuple)):
        values = [_plain(value, leaf, f"{path}.{i}") for i, value in enumerate(cast("list[Any]", node))]
        return values if isinstance(node, list) else tuple(values)
    if type(node) not in _PLAIN:
        raise CheckpointError(f"{path.lstrip('.')}: a checkpoint holds tensors and plain values, not {type(node).__name__}.")
    return sys.intern(node) if isinstance(node, str) else node


def _stored(content: dict[str, Any]) -> dict[str, Any]:
    """The content with compact CPU tensors. Each leaf of `state` gets its own memory; other entries still share it."""
    taken: set[int] = set()
    copies: dict[Any, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        copy = _compact(tensor, fresh=storage in taken)
        taken.add(storage)
        copies.setdefault(_view(tensor), copy)  # the first one: a parameter comes before a slot that is its alias at the start
        return copy

    def shared(tensor: Tensor) -> Tensor:
        known = copies.get(_view(tensor)) if tensor.numel() else None
        return own(tensor) if known is None else known

    state = _plain(content["state"], own, "state")
    return {key: state if key == "state" else _plain(value, shared, key) for key, value in content.items()}


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _compact(tensor: Tensor, *, fresh: bool) -> Tensor:
    """A contiguous CPU tensor that has its storage to itself: of a view torch.save would write the whole storage."""
    flat = tensor.detach().to("cpu").reshape(-1)
    if fresh or flat.untyped_storage().nbytes() != flat.nbytes:
        flat = flat.clone()
    return _dense(flat.view(tensor.shape))


def _dense(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise CheckpointError(f"a checkpoint holds dense tensors, not {type(tensor).__name__} on {tensor.device.type}.")
    return tensor


def _described(state: Any) -> list[list[Any]]:
    """`[path, dtype or type, shape]` of every leaf."""
    return [
        [path, str(leaf.dtype).removeprefix("torch."), list(leaf.shape)]
        if isinstance(leaf, Tensor)
        else [path, type(leaf).__name__, []]
        for path, leaf in tree.items(state)
    ]


def _spec(leaves: Mapping[str, Any], path: str) -> str:
    if path not in leaves:
        return "has nothing"
    ((_, kind, shape),) = _described({path: leaves[path]})
    return f"has {kind} {tuple(shape)}" if isinstance(leaves[path], Tensor) else f"has a plain {kind}"


_STATISTICS = ("running_mean", "running_var")  # torch's names; an infinity there stays for ever


def _refuse_non_finite(state: Mapping[str, Any]) -> None:
    """Sum every leaf, with one device read in all. Check each element only where a sum is not finite: it may have overflowed."""
    leaves = [
        (p, t.detach())
        for p, t in tree.items({name: state[name] for name in ("params", "opt_state", "buffers", "slots")})
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    ]
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).abs().to(torch.float64) for _, t in leaves]
    totals = cast("list[float]", torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else [])
    for (path, tensor), total in zip(leaves, totals, strict=True):
        if math.isfinite(total) or (bad := _never_right(path, state)) is None:
            continue
        if bad(tensor).any():
            raise NonFiniteError(f"{path} has a NaN or infinite value. Nothing was saved. Older checkpoints are untouched.")


def _never_right(path: str, state: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Which elements a leaf may not have. A mask may hold -inf, and the memory of a hook anything, but a copy of the model not."""
    room, _, name = path.partition(".")
    if room == "slots":
        ends = [name[i + 1 :] for i, c in enumerate(name) if c == "."]  # an average of `l.weight` is at "ema.l.weight"
        room = next((r for r in ("params", "buffers") if any(e in state[r] for e in ends)), "")
        if not room:
            return None
    return torch.isnan if room == "buffers" and not path.endswith(_STATISTICS) else _not_finite


def _not_finite(tensor: Tensor) -> Tensor:
    return ~tensor.isfinite()


def _check_archive(data: bytes) -> None:
    """Refuse a zip that torch.save does not write: compressed entries, a name twice, more bytes than the file has."""
    entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    names = {entry.filename for entry in entries}
    plain = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
    if len(names) < len(entries) or not plain or sum(e.file_size for e in entries) > len(data):
        raise ValueError("not an archive of torch.save")
