"""The bare loss: model, criterion and mapping as one pure function `(params, buffers, batch) -> (total, Aux)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ailab.binding import Binding, name_outputs
from ailab.errors import ConfigError
from ailab.types import WEIGHT, Aux, Batch, Buffers, Loss, Mean, Params, TrainState, widened

LOSS_PREFIX = "loss."  # of the criterion's own parameters and buffers


class Functional:
    """A module as a pure function of its tensors.

    Holds a skeleton: a copy of the module whose parameters and buffers are on the meta device, so that the state is the only
    place where values live and a training and an evaluating form can stand side by side.

    Args:
        module: any module; it is not changed.
        training: the mode of the skeleton.
        prefix: of the module's tensors in the state.
        via: makes another callable out of the skeleton, to be called in its place (a loss asked for per-sample values).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        training: bool,
        prefix: str = "",
        via: Callable[[nn.Module], Callable[..., Any] | None] | None = None,
    ):
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
        memo.update({id(b): b.detach().to("meta") for b in module.buffers()})
        skeleton = copy.deepcopy(module, memo).train(training)
        self.call: Callable[..., Any] = (via(skeleton) if via else None) or skeleton
        names = {id(t): prefix + n for n, t in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
        homes = _homes(skeleton)
        self._root = _Root(skeleton, self.call)
        self._names = [("skeleton." + path, names[id(store[key])]) for path, store, key in homes]
        self._homes = [(store, key, names[id(store[key])]) for _, store, key in homes]

    def __call__(self, params: Params, buffers: Buffers, kwargs: Mapping[str, Any]) -> Any:
        """The module's output for these tensors; `buffers` are written to, or get a new tensor, where the module does so."""
        if torch.compiler.is_compiling():
            own = {n: params[name] if name in params else buffers[name] for n, name in self._names}
            # Every place is named, so nothing is left to tie: Dynamo cannot tell which of the skeleton's tensors are one.
            result = torch.func.functional_call(self._root, own, (), dict(kwargs), tie_weights=False)
            for n, name in self._names:
                if name in buffers and own[n] is not buffers[name]:
                    buffers[name] = own[n].detach()
            return result
        # Eager mode: what functional_call does, with its look-ups done once (they cost 5 % of a small step).
        kept = [store[key] for store, key, _ in self._homes]
        try:
            for store, key, name in self._homes:
                store[key] = params[name] if name in params else buffers[name]
            result = self.call(**kwargs)
            for store, key, name in self._homes:
                if name in buffers and store[key] is not buffers[name]:  # assigned to: `self.count = self.count + 1`
                    buffers[name] = store[key].detach()
            return result
        finally:
            for (store, key, _), old in zip(self._homes, kept, strict=True):
                store[key] = old


class _Root(nn.Module):
    """A skeleton and the callable that stands for it, as one module for `functional_call`."""

    call: Callable[..., Any]

    def __init__(self, skeleton: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.skeleton = skeleton
        self.__dict__["call"] = call  # not a sub-module of its own, though it may be the skeleton itself

    def forward(self, **kwargs: Any) -> Any:
        return self.call(**kwargs)


def _homes(skeleton: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """`(dotted path, dict, key)` for every place that holds a tensor; a tied one has several."""
    stores = [(path, store) for path, module in skeleton.named_modules() for store in (module._parameters, module._buffers)]
    return [
        (f"{path}.{key}" if path else key, store, key) for path, store in stores for key, t in store.items() if t is not None
    ]


def module_state(model: nn.Module, criterion: nn.Module | None = None) -> TrainState:
    """The state before the first step: the modules' own tensors (shared, not copied), no optimizer memory, no slots.

    Raises:
        ConfigError: when a sub-module of the model is called "loss" and the criterion has tensors of its own.
    """
    params: Params = dict(model.named_parameters())
    buffers: Buffers = dict(model.named_buffers())
    if criterion is not None:
        own = [*criterion.named_parameters(), *criterion.named_buffers()]
        if own and any(n.startswith(LOSS_PREFIX) for n in [*params, *buffers]):
            raise ConfigError("cfg.model: the model has a sub-module 'loss', and cfg.loss has tensors that go by that name.")
        params.update({LOSS_PREFIX + n: p for n, p in criterion.named_parameters()})
        buffers.update({LOSS_PREFIX + n: b for n, b in criterion.named_buffers()})
    return TrainState(torch.zeros((), dtype=torch.int64), params, buffers, {}, {})


def state_dict_of(model: nn.Module) -> Callable[[TrainState], dict[str, Tensor]]:
    """How to give a state's values the names of `model.state_dict()`: tied tensors twice, non-persistent buffers not at all."""
    names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    tensors = model.state_dict(keep_vars=True)
    wanted = {key: names[id(t)] for key, t in tensors.items() if isinstance(t, Tensor) and id(t) in names}

    def named(state: TrainState) -> dict[str, Tensor]:
        return {key: state.params[n] if n in state.params else state.buffers[n] for key, n in wanted.items()}

    return named


def batch_size(batch: Batch) -> int:
    """Samples in a batch, padding included: the first dimension of its first tensor."""
    return next(int(v.shape[0]) for v in batch.values() if isinstance(v, Tensor) and v.dim() > 0)


def as_mean(value: Any, batch: Batch) -> Mean:
    """What a criterion returned as a `Mean`: a `Mean`, per-sample losses (B,), or a scalar mean over the samples.

    Raises:
        ConfigError: for anything else. Shapes are static, so this is found on the first, shrunk step of a run.
    """
    if isinstance(value, Mean):
        return value
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"cfg.loss: the criterion returned {type(value).__name__}; return a tensor, a Mean, or a dict of them."
        )
    size = batch_size(batch)
    if value.dim() == 0:
        value = widened(value)
        return Mean(value * size, torch.full_like(value, float(size)).detach())
    if value.shape == (size,):
        return Mean.of(value, batch.get(WEIGHT))
    raise ConfigError(
        f"cfg.loss: the criterion returned a tensor of shape {tuple(value.shape)}, which is not a scalar.\n"
        f"  Return a scalar, one loss per sample ({size},), or ailab.Mean(total, weight)."
    )


def _combine(result: Any, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
    """The criterion's result as the loss and the named parts of it (the sum of the parts is the loss)."""
    if not isinstance(result, Mapping):
        mean = as_mean(result, batch)
        return mean, {}
    parts = {str(name): as_mean(value, batch) for name, value in result.items()}
    weight = batch[WEIGHT].sum() if WEIGHT in batch else float(batch_size(batch))
    total = torch.stack([p.value * weight for p in parts.values()]).sum()
    return Mean(total, torch.as_tensor(weight, dtype=total.dtype, device=total.device)), parts


def unless_empty(loss: Loss) -> Loss:
    """`loss`, which cannot mask padding, on a rank that may have padding only: nothing of such a batch counts.

    Its batches have the field `_weight` only where all of it is 0; the samples in them are stand-ins.
    """

    def counted(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        total, aux = loss(params, buffers, batch)
        if WEIGHT not in batch:
            return total, aux
        logs = {n: Mean(m.total * 0, m.weight * 0) for n, m in aux.logs.items()}
        return total * 0, replace(aux, weight=aux.weight * 0, logs=logs)

    return counted


def pure_loss(
    model: Callable[[Params, Buffers, Mapping[str, Any]], Any],
    model_binding: Binding,
    criterion: Callable[[Params, Buffers, Mapping[str, Any]], Any] | None,
    loss_binding: Binding | None,
    output_keys: Sequence[str] = ("output",),
) -> Loss:
    """Model and criterion as one pure function of `(params, buffers, batch)`.

    The first result is the *total* of the loss over the batch, () in the loss's dtype; `aux.weight` is what it is to be
    divided by, so that micro-batches and ranks add up exactly. `aux.logs` holds "loss" and, for a criterion that returns a
    dict, its parts. Without a criterion the model itself must give an output named "loss".
    """

    def loss(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        after = {n: b.clone() for n, b in buffers.items()}  # a forward may write to what it is given (BatchNorm)
        outputs = name_outputs(model(params, after, model_binding.kwargs(batch)), output_keys, "cfg.model.output_keys")
        if criterion is None or loss_binding is None:
            result = outputs["loss"]
        else:
            result = criterion(params, after, loss_binding.kwargs({**batch, **outputs}))
        mean, parts = _combine(result, batch)
        logs = {"loss": Mean(mean.total.detach(), mean.weight.detach())}
        for name, part in parts.items():
            logs[name] = Mean(part.total.detach(), part.weight.detach())
        seen = {n: v.detach() if isinstance(v, Tensor) else v for n, v in outputs.items()}
        return mean.total, Aux(after, logs["loss"].weight, logs, seen)

    return loss
