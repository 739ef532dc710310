"""The bare loss: model, criterion and mapping as one pure function `(params, buffers, batch) -> (total, Aux)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ailab import tree
from ailab.binding import Binding, name_outputs
from ailab.core.criterion import Result, result_of
from ailab.errors import ConfigError
from ailab.types import GIVEN, VIEWS, WEIGHT, Aux, Batch, Buffers, Loss, Mean, Params, TrainState

T = TypeVar("T")
LOSS_PREFIX = "loss."  # of the criterion's own parameters and buffers
Change = Callable[[nn.Module], None]  # alters classes and attributes of sub-modules; every tensor stays where it is


class _GradientHooks(torch.autograd.Function):
    """The identity, whose gradient goes through the hooks that a user registered on a parameter."""

    @staticmethod
    def forward(x: Tensor, hooks: tuple[Callable[[Tensor], Tensor | None], ...]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.hooks = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        for hook in ctx.hooks:
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad, None


def gradient_hooks(param: Tensor) -> tuple[Callable[[Tensor], Tensor | None], ...]:
    """What `param.register_hook` was given, in order; a private name of torch.

    Raises:
        ConfigError: for `register_post_accumulate_grad_hook`: here no gradient is accumulated in a parameter.
    """
    if getattr(param, "_post_accumulate_grad_hooks", None):
        raise ConfigError(
            "cfg.model: a parameter has a hook of register_post_accumulate_grad_hook, and gradients are not accumulated in "
            "parameters here.\n  register_hook, or a hook of ailab at depth 'grad', changes a gradient."
        )
    return tuple((getattr(param, "_backward_hooks", None) or {}).values())


_held: list[tuple[Functional, list[Tensor]]] | None = None  # whose tensors come back after the backward


def tensors_held() -> AbstractContextManager[None]:
    """Inside, forwards leave the tensors that they were given in their modules; they come out at the end.

    A backward that computes a part of the forward again (`torch.utils.checkpoint` in a user's model) reads them there.
    """
    return nullcontext() if torch.compiler.is_compiling() else _Held()


class _Held(AbstractContextManager[None]):
    """A class and no generator: it is entered once a step."""

    def __enter__(self) -> None:
        global _held
        self.before, _held = _held, []

    def __exit__(self, *_: object) -> None:
        global _held
        done, _held = _held, self.before
        for functional, kept in reversed(done or ()):
            functional.put_back(kept)


def while_tracing(fn: Callable[..., T]) -> Callable[..., T]:
    """Run a function while a graph is traced, and its result is a constant of the graph.

    It is `torch.compiler.assume_constant_result`, which would import the compiler; what that sets is a private name.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined] # tests/job/test_proof.py fails where torch has another name
    return fn


class Functional:
    """A module as a pure function of its tensors: the user's own module is called, with other tensors swapped in.

    So a closure, a forward hook or a lambda that reaches a tensor through an attribute of the module finds the right one. What
    reaches it in another way (a plain list of parameters) is found by `ailab.job.proof` before the first step.

    Args:
        module: any module. Its mode (training or evaluation) becomes that of the last call.
        training: the mode of a call.
        prefix: of the module's tensors in the state.
        via: makes another callable of the module, to be called in its place (a loss asked for per-sample values).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        training: bool,
        prefix: str = "",
        via: Callable[[nn.Module], Callable[..., Any] | None] | None = None,
    ):
        self.module, self.training = module, training
        self.call: Callable[..., Any] = (via(module) if via else None) or module
        self._root = _Root(module, self.call)
        names = {id(t): prefix + n for n, t in [*module.named_parameters(), *module.named_buffers()]}
        places = [(path, store, key, names[id(store[key])]) for path, store, key in homes(module)]
        self._names = [("module." + path, name) for path, _, _, name in places]
        self._homes = [(store, key, name) for _, store, key, name in places]
        # What a forward leaves in plain attributes (the old weight_norm, features for a later layer). It must not leave a graph.
        self._scratch = [(m, k) for m in module.modules() for k, v in vars(m).items() if isinstance(v, Tensor)]
        found = {prefix + n: gradient_hooks(p) for n, p in module.named_parameters()}
        self._hooks = {n: hooks for n, hooks in found.items() if hooks}

    def __call__(self, params: Params, buffers: Buffers, kwargs: Mapping[str, Any]) -> Any:
        """The module's output for these tensors; `buffers` are written to, or get a new tensor, where the module does so."""
        if self._hooks:
            params = {**params, **{n: self._hooked(params[n], hooks) for n, hooks in self._hooks.items()}}
        if torch.compiler.is_compiling():
            self._set_mode()
            before = [getattr(m, k) for m, k in self._scratch]
            own = {n: params[name] if name in params else buffers[name] for n, name in self._names}
            # Every place is named, so nothing is left to tie: Dynamo cannot tell which of the module's tensors are one.
            result = torch.func.functional_call(self._root, own, (), dict(kwargs), tie_weights=False)
            for n, name in self._names:
                if name in buffers and own[n] is not buffers[name]:
                    buffers[name] = own[n].detach()
            for (m, k), value in zip(self._scratch, before, strict=True):
                setattr(m, k, value)
            return result
        # Eager mode: what functional_call does, with its look-ups done once (they cost 5 % of a small step).
        if self.module.training is not self.training:
            self.module.train(self.training)
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
            if _held is None:
                self.put_back(kept)
            elif kept:
                _held.append((self, kept))

    def put_back(self, kept: list[Tensor]) -> None:
        """Give the module the tensors again that it had before a call."""
        for (store, key, _), old in zip(self._homes, kept, strict=True):
            store[key] = old

    def _hooked(self, param: Tensor, hooks: tuple[Callable[[Tensor], Tensor | None], ...]) -> Tensor:
        # A parameter that has the hooks itself needs no others.
        own = param.requires_grad and not torch.compiler.is_compiling() and gradient_hooks(param) == hooks
        return param if own or not param.requires_grad else _GradientHooks.apply(param, hooks)  # type: ignore[return-value] # apply is untyped

    @while_tracing
    def _set_mode(self) -> bool:
        """Runs while a graph is traced, and not in it: the mode is fixed in the graph."""
        self.module.train(self.training)
        for m, k in self._scratch:
            setattr(m, k, getattr(m, k).detach())  # what an eager forward left there has a graph
        return True


class _Root(nn.Module):
    """A module and the callable that stands for it, as one module for `functional_call`."""

    call: Callable[..., Any]

    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.__dict__["call"] = call  # not a sub-module of its own, though it may be the module itself

    def forward(self, **kwargs: Any) -> Any:
        return self.call(**kwargs)


def homes(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """`(dotted path, dict, key)` for every place that holds a tensor; a tied one has several."""
    stores = [(path, store) for path, m in module.named_modules() for store in (m._parameters, m._buffers)]
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


def remodelled(loss: Loss, change: Change) -> Loss:
    """`loss`, whose model `change` has altered in place: classes and attributes of sub-modules, but no tensor.

    `change` may come several times, and does nothing the second time.

    Raises:
        ConfigError: when `loss` is none that `pure_loss` made, so that there is no module to alter.
    """
    model = getattr(loss, "model", None)
    if model is None:
        raise ConfigError("a hook changes modules of the model, and this loss was not made of a module by `loss_of`.")
    change(model)
    return loss


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

    return described_as(loss, counted)


def described_as(loss: Loss, wrapper: Loss) -> Loss:
    """`wrapper`, which says that it was made of what `loss` was made of."""
    return _described(wrapper, getattr(loss, "model", None), getattr(loss, "kind", None))


def _described(loss: Loss, model: nn.Module | None, kind: Callable[..., str] | None) -> Loss:
    """`loss`, which says what it was made of: for `remodelled` and `kind_of`.

    In attributes of the function: what is compiled has to be a plain function, with a code object of its own.
    """
    loss.model, loss.kind = model, kind  # type: ignore[attr-defined] # a Callable declares none
    return loss


def outputs_of(
    model: Functional, binding: Binding, output_keys: Sequence[str], params: Params, buffers: Buffers, batch: Batch
) -> dict[str, Any]:
    """The model's outputs by name: those that the batch has in its field GIVEN, else of a forward that may write to `buffers`."""
    if GIVEN in batch:
        return batch[GIVEN]
    return name_outputs(model(params, buffers, binding.kwargs(batch)), output_keys, "cfg.model.output_keys")


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
    """
    obeys = loss_binding is not None and loss_binding.may_read(WEIGHT)

    def evaluated(params: Params, buffers: Buffers, batch: Batch) -> tuple[Result, Buffers, dict[str, Any]]:
        after = {n: b.clone() for n, b in buffers.items()}  # a forward may write to what it is given (BatchNorm)
        outputs = outputs_of(model, model_binding, output_keys, params, after, batch)
        if criterion is None and VIEWS in batch:
            raise ConfigError(
                "cfg.loss: a hook changes what the criterion sees, and there is none: the model gives its own loss."
            )

        def ask(view: Batch) -> Any:
            if criterion is None or loss_binding is None:
                return outputs["loss"]
            return criterion(params, after, loss_binding.kwargs({**view, **outputs}))

        return result_of(ask, batch, obeys), after, outputs

    def loss(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        found, after, outputs = evaluated(params, buffers, batch)
        logs = {"loss": found.loss, **found.parts}
        logs = {n: Mean(m.total.detach(), m.weight.detach()) for n, m in logs.items()}
        # In nests too: nothing that comes out may hold the graph.
        detached = {n: v.detach() if type(v) is Tensor else tree.map(lambda t: t.detach(), v) for n, v in outputs.items()}
        return found.loss.total, Aux(after, logs["loss"].weight, logs, detached)

    return _described(loss, model.module, lambda *args: evaluated(*args)[0].kind)


def kind_of(loss: Loss, params: Params, buffers: Buffers, batch: Batch) -> str:
    """What the criterion returned for a batch: "mean", "sum" or "scalar"; "mean" for a loss that `pure_loss` did not make."""
    kind = getattr(loss, "kind", None)
    return "mean" if kind is None else kind(params, buffers, batch)
