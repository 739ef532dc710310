"""Trees <-> files: a `TrainState` and what goes with it, as plain dicts of CPU tensors that any torch can read.

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
from ailab.workdir.commit import Keep, newest, retain
from ailab.workdir.manifest import Checkpoint, read_checkpoint

__all__ = [
    "Checkpoint",
    "Keep",
    "get_target_module_state",
    "load",
    "newest",
    "remove_module_prefix",
    "restore",
    "retain",
    "save",
    "to_plain",
]
_PLAIN = (bool, int, float, str, type(None))  # by exact type: a numpy float is a float that weights_only refuses
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and DataParallel, and of torch.compile


def to_plain(state: TrainState) -> dict[str, Any]:
    """The state as nested dicts, lists and tuples that share its tensors.

    Raises `CheckpointError` for a leaf that is neither a tensor nor a bool, int, float, str or None.
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
) -> Path:
    """Write `content`, which has at least the entry `state` of `to_plain`, and return the folder once it is durable.

    `step` and `epoch` count what has been completed. The same content gives the same bytes. A tensor that other entries share
    with `state` is stored once. If the step is there already, valid and not of an earlier epoch (a run that was stopped between
    the training and the evaluation of an epoch saves its last step twice), it is kept. Raises `NonFiniteError` naming the first
    tensor with a NaN or an infinity (in buffers: with a NaN; a mask may hold -inf), and `CheckpointError` when it cannot be
    written; then older checkpoints are untouched.
    """
    try:
        if (path := commit.find_committed(directory, step, epoch)) is not None:
            return path
        _refuse_non_finite(content["state"])
        stored = _stored({**content, "epoch": epoch, "step": step})
        buffer = io.BytesIO()  # torch.save names the inner folder after a path, and hides what a full disk said
        torch.save(stored, buffer)
        head = {"step": step, "epoch": epoch, "tree": _described(stored["state"]), "torch": torch.__version__}
        head |= {"fingerprint": fingerprint or {}, "metrics": metrics or {}}
        return commit.commit(directory, head, buffer.getbuffer())
    except AilabError:
        raise
    except (OSError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{directory}: step {step} could not be saved: {error}") from error


def load(path: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The content of a checkpoint, on the CPU, verified. Never executes what it reads; raises `CheckpointError`."""
    checkpoint, data = read_checkpoint(Path(path))
    try:
        _check_archive(data)
        content = _plain(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), _dense)
        described = _described(content["state"])
    except Exception as error:  # whatever foreign bytes provoke; there is no second, less safe attempt
        raise CheckpointError(f"{path}: its state is refused: {type(error).__name__}.") from error
    if described != checkpoint.manifest["tree"]:
        raise CheckpointError(f"{path}: its state is not the one that its manifest describes.")
    return content, checkpoint


def restore(like: TrainState, saved: Any) -> TrainState:
    """A new state with the values of `saved`, the entry `state` of a content, and the devices and memory layouts of `like`.

    Nothing is cast or broadcast: raises `CheckpointError` with the first 5 paths where path, shape, dtype or type differ.
    """
    wanted, found = dict(tree.items(to_plain(like))), dict(tree.items(saved))
    paths = [path for path in {**wanted, **found} if _spec(wanted, path) != _spec(found, path)]
    if paths:
        lines = [f"  {ascii(path)[1:-1]}: checkpoint {_spec(found, path)}, run {_spec(wanted, path)}" for path in paths[:5]]
        raise CheckpointError(f"The checkpoint does not fit this run: {len(paths)} entries differ.\n" + "\n".join(lines))

    def placed(path: str, leaf: Any) -> Any:
        return torch.empty_like(leaf).copy_(found[path]) if isinstance(leaf, Tensor) else found[path]

    return tree.unflatten(like, [placed(path, leaf) for path, leaf in wanted.items()])


def remove_module_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new state_dict without the leading "module." and "_orig_mod." that wrappers put before a model's own names.

    After "module.", a "model." that every name has goes too: the files of the first ailab have it. Raises `ConfigError` where
    two names become one.
    """
    short = {name: _unwrapped(name) for name in state_dict}
    if all(new.startswith("model.") and "module." in name.removesuffix(new) for name, new in short.items()):
        short = {name: _unwrapped(new.removeprefix("model.")) for name, new in short.items()}
    if len(set(short.values())) < len(short):
        raise ConfigError("remove_module_prefix: two names differ in nothing but the prefix of a wrapper.")
    return {short[name]: value for name, value in state_dict.items()}


def get_target_module_state(state_dict: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of the sub-module `name` (dotted), under its own names; raises `ConfigError` if there are none."""
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
    """Any tree as fresh dicts, lists and tuples with interned strings, so that what is pickled depends on values alone."""
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
    """The content with compact CPU tensors: each leaf of `state` has its own memory, other entries share it where they did."""
    taken: set[int] = set()
    copies: dict[Any, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        copy = _compact(tensor, fresh=storage in taken)
        taken.add(storage)
        copies.setdefault(_view(tensor), copy)  # the first: a parameter comes before a slot that started as its alias
        return copy

    def shared(tensor: Tensor) -> Tensor:
        known = copies.get(_view(tensor)) if tensor.numel() else None
        return own(tensor) if known is None else known

    state = _plain(content["state"], own, "state")
    return {key: state if key == "state" else _plain(value, shared, key) for key, value in content.items()}


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _compact(tensor: Tensor, *, fresh: bool) -> Tensor:
    """On the CPU, contiguous, and all of its storage: a view would take the whole storage along."""
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


def _refuse_non_finite(state: Mapping[str, Any]) -> None:
    """Sum every leaf, in one device read, and look closer where a sum is not finite: an overflow or a mask does that too."""
    entries = {name: state[name] for name in ("params", "opt_state", "buffers")}
    leaves = [
        (p, t.detach()) for p, t in tree.items(entries) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    ]
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).abs().to(torch.float64) for _, t in leaves]
    totals = cast("list[float]", torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else [])
    for (path, tensor), total in zip(leaves, totals, strict=True):
        if math.isfinite(total):
            continue
        if (tensor.isnan() if path.startswith("buffers.") else ~tensor.isfinite()).any():
            raise NonFiniteError(f"{path} has a NaN or infinite value. Nothing was saved; older checkpoints are untouched.")


def _check_archive(data: bytes) -> None:
    """Only what torch.save writes: a zip of stored entries, no name twice, no more bytes than the file has."""
    entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
    names = {entry.filename for entry in entries}
    plain = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
    if len(names) < len(entries) or not plain or sum(e.file_size for e in entries) > len(data):
        raise ValueError("not an archive of torch.save")
