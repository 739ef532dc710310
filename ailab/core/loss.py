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
from ailab.types import VIEWS, WEIGHT, Aux, Batch, Buffers, Loss, Mean, Params, TrainState, widened

LOSS_PREFIX = "loss."  # of the criterion's own parameters and buffers
Change = Callable[[nn.Module], None]  # alters classes and attributes of sub-modules; every tensor stays where it is


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
        self._settle(skeleton, {path: names[id(store[key])] for path, store, key in homes(skeleton)})

    def _settle(self, skeleton: nn.Module, names: Mapping[str, str]) -> None:
        """Look up once where each tensor goes; `names`: of the state, by the dotted path in the skeleton."""
        places = homes(skeleton)
        self._root = _Root(skeleton, self.call)
        self._names = [("skeleton." + path, names[path]) for path, _, _ in places]
        self._homes = [(store, key, names[path]) for path, store, key in places]

    def changed(self, change: Change) -> Functional:
        """The same function of the same tensors, computed by a copy of the skeleton that `change` has altered in place."""
        other = copy.copy(self)
        skeleton = other.call = copy.deepcopy(self._root.skeleton)
        change(skeleton)
        other._settle(skeleton, {path.removeprefix("skeleton."): name for path, name in self._names})
        return other

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


def homes(skeleton: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
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


def as_mean(value: Any, batch: Batch, share: Tensor | None = None) -> Mean:
    """What a criterion returned as a `Mean`: a `Mean`, per-sample losses (B,), or a scalar mean over the samples.

    Args:
        value: what it returned.
        batch: what it was given, with the weights of the samples.
        share: how often a value that no weights have reached is to count.

    Raises:
        ConfigError: for anything else. Shapes are static, so this is found on the first, shrunk step of a run.
    """
    size = batch_size(batch)
    if isinstance(value, Tensor) and value.shape == (size,) and value.dim() > 0:
        return Mean.of(value, batch.get(WEIGHT))
    if isinstance(value, Mean):
        return value if share is None else _shared(value, share)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"cfg.loss: the criterion returned {type(value).__name__}; return a tensor, a Mean, or a dict of them."
        )
    if value.dim() == 0:
        value = widened(value)
        mean = Mean(value * size, torch.full_like(value, float(size)).detach())
        return mean if share is None else _shared(mean, share)
    raise ConfigError(
        f"cfg.loss: the criterion returned a tensor of shape {tuple(value.shape)}, which is not a scalar.\n"
        f"  Return a scalar, one loss per sample ({size},), or ailab.Mean(total, weight)."
    )


def _shared(mean: Mean, share: Tensor) -> Mean:
    if share.dim():
        raise ConfigError(
            "cfg.loss: a hook weighs each sample on its own, and the criterion gives one number for all of them.\n"
            "  Let it return one loss per sample (B,), or a Mean that obeys its argument `weight`."
        )
    return Mean(mean.total * share, mean.weight * share)


def _views(ask: Callable[[Batch], Any], batch: Batch, obeys: bool) -> dict[str, Mean]:
    """What the criterion says of a batch, by the name of the part ("" where it has none): the sums over all views of it.

    Args:
        ask: the criterion over the fields of a view.
        batch: with the field VIEWS where a hook has put it; else there is one view, the batch itself.
        obeys: whether the criterion is given the weights, so that a `Mean` of it has counted them.
    """
    if VIEWS not in batch:
        return {n: as_mean(v, batch) for n, v in _named(ask(batch)).items()}
    found: dict[str, Mean] = {}
    for share, fields in batch[VIEWS]:
        view = {**batch, **fields}
        if share is not None:
            view[WEIGHT] = share * (batch[WEIGHT] if WEIGHT in batch else torch.ones(batch_size(batch), device=share.device))
        for name, value in _named(ask(view)).items():
            mean = as_mean(value, view, None if isinstance(value, Mean) and obeys else share)
            sums = found[name] + mean if name in found else mean
            # The shares of a sample add up to 1; so do they here, without rounding.
            found[name] = Mean(sums.total, as_mean(value, batch).weight) if isinstance(value, Tensor) else sums
    return found


def _named(result: Any) -> dict[str, Any]:
    """A criterion's result by the names of its parts; "" where it is one number."""
    return {str(n): v for n, v in result.items()} if isinstance(result, Mapping) else {"": result}


def _combine(parts: Mapping[str, Mean], batch: Batch) -> tuple[Mean, dict[str, Mean]]:
    """The parts of a loss as the loss and its named parts (the sum of the parts is the loss)."""
    if "" in parts:
        return parts[""], {}
    weight = batch[WEIGHT].sum() if WEIGHT in batch else float(batch_size(batch))
    total = torch.stack([p.value * weight for p in parts.values()]).sum()
    return Mean(total, torch.as_tensor(weight, dtype=total.dtype, device=total.device)), dict(parts)


def remodelled(loss: Loss, change: Change) -> Loss:
    """`loss` with the same tensors, names and criterion, over a copy of the model's skeleton that `change` has altered.

    Raises:
        ConfigError: when `loss` is none that `pure_loss` made, so that there is no module to alter.
    """
    remake = getattr(loss, "remodelled", None)
    if remake is None:
        raise ConfigError("a hook changes modules of the model, and this loss was not made of a module by `loss_of`.")
    return remake(change)


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

    counted.remodelled = lambda change: unless_empty(remodelled(loss, change))  # type: ignore[attr-defined]
    return counted


def pure_loss(
    model: Functional,
    model_binding: Binding,
    criterion: Callable[[Params, Buffers, Mapping[str, Any]], Any] | None,
    loss_binding: Binding | None,
    output_keys: Sequence[str] = ("output",),
) -> Loss:
    """Model and criterion as one pure function of `(params, buffers, batch)`.

    The first result is the *total* of the loss over the batch, () in the loss's dtype; `aux.weight` is what it is to be
    divided by, so that micro-batches and ranks add up exactly. `aux.logs` holds "loss" and, for a criterion that returns a
    dict, its parts. Without a criterion the model itself must give an output named "loss".

    A batch with the field VIEWS, [(share, fields)], has its criterion asked once for each: with these fields in place of the
    batch's, and every sample counting `share` times, () or (B,); None is once. The shares of a sample add up to 1. The sums are
    added, and divided once.
    """
    obeys = loss_binding is not None and any(f == WEIGHT for _, f in (*loss_binding.mapped, *loss_binding.free))

    def loss(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        after = {n: b.clone() for n, b in buffers.items()}  # a forward may write to what it is given (BatchNorm)
        outputs = name_outputs(model(params, after, model_binding.kwargs(batch)), output_keys, "cfg.model.output_keys")
        if criterion is None and VIEWS in batch:
            raise ConfigError(
                "cfg.loss: a hook changes what the criterion sees, and there is none: the model gives its own loss."
            )

        def ask(view: Batch) -> Any:
            if criterion is None or loss_binding is None:
                return outputs["loss"]
            return criterion(params, after, loss_binding.kwargs({**view, **outputs}))

        found = _views(ask, batch, obeys)
        mean, parts = _combine(found, batch)
        logs = {"loss": Mean(mean.total.detach(), mean.weight.detach())}
        for name, part in parts.items():
            logs[name] = Mean(part.total.detach(), part.weight.detach())
        seen = {n: v.detach() if isinstance(v, Tensor) else v for n, v in outputs.items()}
        return mean.total, Aux(after, logs["loss"].weight, logs, seen)

    def remade(change: Change) -> Loss:
        return pure_loss(model.changed(change), model_binding, criterion, loss_binding, output_keys)

    loss.remodelled = remade  # type: ignore[attr-defined]
    return loss
