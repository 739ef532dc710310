"""What is proven on the first samples, before a run: the pure loss is the user's own module, and which losses can mask padding."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ailab import tree
from ailab.binding import Binding, name_outputs
from ailab.core.criterion import result_of
from ailab.core.loss import LOSS_PREFIX, tensors_held
from ailab.errors import ConfigError
from ailab.rng import seed_device
from ailab.types import WEIGHT, Batch, Loss, Mean, TrainState, batch_size

_HALVES = (torch.float16, torch.bfloat16)
_FEW = 8  # names in a message
_WIDE = torch.complex128  # holds any number


@dataclass(frozen=True)
class Itself:
    """The user's own objects, as plain torch calls them."""

    model: nn.Module
    binding: Binding
    criterion: Any
    loss_binding: Binding | None
    output_keys: Sequence[str]

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of a batch: total / weight, ()."""
        outputs = name_outputs(self.model(**self.binding.kwargs(batch)), self.output_keys, "cfg.model.output_keys")

        def ask(fields: Batch) -> Any:
            if self.criterion is None or self.loss_binding is None:
                return outputs["loss"]
            return self.criterion(**self.loss_binding.kwargs({**fields, **outputs}))

        loss = result_of(ask, batch, obeys=False).loss
        return loss.total / loss.weight

    def modules(self) -> list[tuple[str, nn.Module]]:
        """(prefix of its names in the state, module) of the model and, where it is a module, the criterion."""
        found = [("", self.model)]
        return [*found, (LOSS_PREFIX, self.criterion)] if isinstance(self.criterion, nn.Module) else found

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers by their names in the state."""
        return {p + n: t for p, m in self.modules() for n, t in [*m.named_parameters(), *m.named_buffers()]}


# ---- the pure loss is the user's module


def prove_pure(itself: Itself, loss: Loss, state: TrainState, sample: Batch, *, training: bool) -> None:
    """Hold the pure loss to the module itself on a few samples: the value, which parameters get a gradient, and the gradients.

    While the pure loss is asked, the module's own tensors are NaN: whatever reaches them by another way than the module's
    attributes shows. The module is left with its own values.

    Raises:
        ConfigError: naming the parameters or buffers that differ; or an attribute of the module that a forward changes.
    """
    with _restored(itself) as saved, torch.random.fork_rng(_devices(state)):
        for _, module in itself.modules():
            module.train(training)
        right, right_grads = _of_module(itself, state, sample, training)
        _refuse_changed_attributes(itself, state, sample)
        _put(itself.tensors(), saved)
        found, grads = _of_pure(itself, loss, state, saved, list(saved), sample, training)
        if not right.isfinite():
            return
        tolerance = 100 * _precision(state)
        if not (found - right).abs() <= tolerance * right.abs().clamp(min=1.0):
            names = _reached_around(itself, loss, state, saved, sample)
            raise ConfigError(
                f"cfg.model: the module itself gives the loss {float(right):.6g}, as a pure function of its tensors it gives "
                f"{float(found):.6g}.\n  {_advice(names)}"
            )
        largest = max([float(g.to_dense().abs().max()) for g in right_grads.values()] or [0.0])
        wrong = [
            n for n in {**right_grads, **grads} if not _same_gradient(right_grads.get(n), grads.get(n), largest, tolerance)
        ]
        if wrong:
            lost = [n for n in wrong if n not in grads]
            what = f"no gradient reaches {_names(lost)}" if lost else f"the gradient is another one for {_names(wrong)}"
            raise ConfigError(f"cfg.model: as a pure function of its tensors, {what}.\n  {_advice(lost or wrong)}")


def _advice(names: Sequence[str]) -> str:
    return (
        f"The module reaches {_names(names) or 'a tensor'} by another way than its attributes: a plain list, or a copy made in\n"
        "  __init__. Use nn.ParameterList, or read self.NAME in forward."
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")


def _of_module(itself: Itself, state: TrainState, sample: Batch, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the module itself, and what `.backward()` leaves in its parameters."""
    params = {p + n: t for p, m in itself.modules() for n, t in m.named_parameters()}
    kept = {n: p.grad for n, p in params.items()}
    seed_device(state.step.device, 0)
    try:
        for p in params.values():
            p.grad = None
        with torch.enable_grad() if training else torch.no_grad():
            value = itself(sample)
            if training and value.requires_grad:
                value.backward()
        return value.detach(), {n: p.grad for n, p in params.items() if p.grad is not None}
    finally:
        for n, p in params.items():
            p.grad = kept[n]


def _of_pure(
    itself: Itself, loss: Loss, state: TrainState, saved: dict[str, Tensor], hidden: list[str], sample: Batch, training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pure loss at the values `saved`, and its gradients, while the module's own tensors of the names `hidden` are NaN."""
    params = {n: saved[n].clone().requires_grad_(p.requires_grad) for n, p in state.params.items()}
    buffers = {n: saved[n].clone() for n in state.buffers}
    own = itself.tensors()
    _put({n: own[n] for n in hidden}, {n: torch.full_like(own[n], torch.nan) for n in hidden if _can_be_nan(own[n])})
    seed_device(state.step.device, 0)
    with torch.enable_grad() if training else torch.no_grad(), tensors_held():
        total, aux = loss(params, buffers, sample)
        value = total / aux.weight
        leaves = {n: p for n, p in params.items() if p.requires_grad}
        if not (training and leaves and value.requires_grad):
            return value.detach(), {}
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {n: g for n, g in zip(leaves, cast("Sequence[Tensor | None]", grads), strict=True) if g is not None}


def _reached_around(itself: Itself, loss: Loss, state: TrainState, saved: dict[str, Tensor], sample: Batch) -> list[str]:
    """The tensors of the module whose own values show in the pure loss."""
    found: list[str] = []
    for n in saved:
        _put(itself.tensors(), saved)
        if _can_be_nan(saved[n]) and not _of_pure(itself, loss, state, saved, [n], sample, False)[0].isfinite():
            found.append(n)
    return found


def _can_be_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def _restored(itself: Itself) -> Generator[dict[str, Tensor]]:
    """Copies of all tensors of the user's modules; at the end the modules have these values again, bit for bit."""
    saved = {n: t.detach().clone() for n, t in itself.tensors().items()}
    try:
        yield saved
    finally:
        _put(itself.tensors(), saved)


def _put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for n, t in tensors.items():
            if n in values:
                t.copy_(values[n])


def _devices(state: TrainState) -> list[torch.device]:
    return [state.step.device] if state.step.device.type == "cuda" else []


def _precision(state: TrainState) -> float:
    """By how much, of 1, the same computation may differ from itself in another shape."""
    if any(p.dtype in _HALVES for p in state.params.values()):
        return 1e-2
    return 2e-3 if state.step.device.type == "cuda" else 1e-5  # products of float32 are TF32 there


def _same_gradient(right: Tensor | None, found: Tensor | None, largest: float, tolerance: float) -> bool:
    if right is None or found is None:
        return right is found
    right, found = right.to_dense().double(), found.to_dense().double()
    if not right.isfinite().all():
        return True
    floor = 1e-5 * largest + 1e-12  # of gradients that are zero but for rounding
    return bool((right - found).abs().max() <= tolerance * right.abs().max() + floor)


# ---- no attribute changes


def _refuse_changed_attributes(itself: Itself, state: TrainState, sample: Batch) -> None:
    """Refuse numbers that a forward counts in attributes: one more forward, and what it changed. A cache is filled by now."""
    before = dict(_attributes(itself))
    with torch.no_grad():
        itself(sample)
    changed = [(n, v, after) for n, after in _attributes(itself) if n in before and (v := before[n]) != after]
    for name, was, now in changed:
        where, _, attribute = name.rpartition(".")
        raise ConfigError(
            f"{where}: a forward changes the attribute {attribute!r}, from {was!r:.40} to {now!r:.40}.\n"
            f"  A compiled step does not see that, and a resumed run begins anew. Make it a buffer, which is part of the state:\n"
            f"  self.register_buffer({attribute!r}, torch.tensor(...)) in __init__, self.{attribute}.add_(1) in forward."
        )


def _attributes(itself: Itself) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every plain attribute of the user's modules."""
    for path, module in [("cfg.model", itself.model), ("cfg.loss", itself.criterion)]:
        parts = module.named_modules() if isinstance(module, nn.Module) else [("", module)]
        for name, part in parts:
            mine = cast("dict[str, Any]", getattr(part, "__dict__", {}))
            for key, value in mine.items():
                if key != "training" and (plain := _plain(value)) is not None:
                    yield ".".join(filter(None, [path, name, key])), plain


def _plain(value: Any, depth: int = 2) -> Any:
    """A value that can be compared; None for what is none: tensors, modules, other objects."""
    if isinstance(value, (bool, int, float, str)):
        return value if value == value else "nan"
    if isinstance(value, (list, tuple, set, frozenset)) and depth:
        return [_plain(v, depth - 1) for v in list(cast("Sequence[Any]", value))[:64]] + [len(cast("Sequence[Any]", value))]
    if type(value) is dict and depth:
        items = cast("dict[Any, Any]", value).items()
        return [(str(k), _plain(v, depth - 1)) for k, v in list(items)[:64]] + [len(items)]
    return None


# ---- padding


def row_wise(loss: Loss, state: TrainState, sample: Batch) -> bool:
    """Whether padding cannot be seen: of a batch whose last rows weigh 0, everything is as of the first rows alone.

    That is the loss, its weight, every log and new buffer, and the outputs of the first rows. False for one number over all
    samples, for a loss that compares samples with each other, and for BatchNorm in training. Random numbers are constants here.
    """
    size = batch_size(sample)
    real = size // 2
    if not real:
        return False
    weight = (torch.arange(size, device=state.step.device) < real).float()
    few = tree.map(lambda t: t[:real] if t.dim() and t.shape[0] == size else t, sample)

    def seen(batch: Batch) -> list[Tensor]:
        with torch.no_grad(), _Constants():
            total, aux = loss(state.params, state.buffers, batch)
        outputs = [t[:real] if t.dim() and t.shape[0] == batch_size(batch) else t for t in _tensors(aux.outputs)]
        means = [t for m in (Mean(total, aux.weight), *aux.logs.values()) for t in (m.total, m.weight)]
        return [*means, *aux.buffers.values(), *outputs]

    with torch.random.fork_rng(_devices(state)):
        try:
            padded, alone = seen({**sample, WEIGHT: weight}), seen({**few, WEIGHT: torch.ones_like(weight[:real])})
        except (RuntimeError, ValueError, IndexError):  # BatchNorm and one row; the run itself will say what is wrong
            return False
    off = _precision(state)

    def close(a: Tensor, b: Tensor) -> bool:
        largest = float(b.to(_WIDE).abs().max()) if b.numel() else 0.0
        return a.shape == b.shape and torch.allclose(a.to(_WIDE), b.to(_WIDE), rtol=off, atol=off * largest)

    return len(padded) == len(alone) and all(close(a, b) for a, b in zip(padded, alone, strict=True))


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree.leaves(values) if isinstance(t, Tensor)]


_IDENTITY = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
    "native_dropout",
}
# Functions that draw, and the constant that stands for what they draw. bernoulli is kept: stochastic depth keeps all.
_DRAWN = {"bernoulli": 1.0, "rand": 0.5, "uniform": 0.5, "randn": 0.0, "normal": 0.0, "exponential": 1.0}
_ATTENTION = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}  # where `dropout_p` stands


class _Constants(TorchFunctionMode):
    """Makes dropout the identity and random numbers constants, so that they do not depend on the number of rows.

    What draws in another way keeps its numbers. Then two calls differ, and the loss counts as one that cannot be padded.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in _IDENTITY:
            return args[0] if args else kwargs["input"]
        if name in _ATTENTION:
            place = _ATTENTION[name]
            args = (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place else args
            kwargs = kwargs if len(args) > place else {**kwargs, "dropout_p": 0.0}
        result = func(*args, **kwargs)
        constant = _DRAWN.get(name.removesuffix("_like").rstrip("_"))
        return result if constant is None else result.fill_(constant)


def check_tail(loss: Loss, state: TrainState, sample: Batch, rows: int, phase: str) -> None:
    """Run a phase's last batch of few rows, where a model may fail that a full batch does not trouble (BatchNorm and one sample).

    Raises:
        ConfigError: with what it raises, and the way out.
    """
    size = batch_size(sample)
    if not 0 < rows < size:
        return
    few = tree.map(lambda t: t[:rows] if t.dim() and t.shape[0] == size else t, sample)
    try:
        with torch.no_grad(), torch.random.fork_rng(_devices(state)):
            loss(state.params, state.buffers, few)
    except (RuntimeError, ValueError, IndexError) as e:
        raise ConfigError(
            f"cfg.data.{phase}: the last batch has {rows} sample{'s' * (rows > 1)}, and the model fails on so few:\n"
            f"  {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}\n"
            f"  Leave it out: data.{phase}_dataloader.drop_last=True; or take another batch_size."
        ) from e
