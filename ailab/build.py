"""A module and a criterion as one pure loss: how a user's own objects enter the stack, with a cfg or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from ailab.binding import OUTPUT_KEYS, Binding, bind
from ailab.core.loss import LOSS_PREFIX, Functional, pure_loss
from ailab.losses.torch_losses import maskable
from ailab.types import WEIGHT, Loss

_NO_MAPPING: Mapping[str, str] = MappingProxyType({})


def loss_of(
    model: nn.Module,
    criterion: Any,
    *,
    training: bool = True,
    mapping: Mapping[str, str] = _NO_MAPPING,
    loss_mapping: Mapping[str, str] = _NO_MAPPING,
    output_keys: Sequence[str] = OUTPUT_KEYS,
    outputs: Sequence[str] | None = None,
) -> Loss:
    """A module and a criterion as one pure loss over named fields: `total, aux = loss(params, buffers, batch)`.

    Args:
        model: its `forward` is given the fields that `mapping` {parameter: field} names, or those of its parameters' names.
        criterion: a module or a callable; see `bound_criterion`. None: the model's output "loss" is the loss.
        training: the mode of the modules.
        mapping: of the model.
        loss_mapping: of the criterion, over the batch and the model's outputs.
        output_keys: names of the model's outputs.
        outputs: the same where `output_keys` does not say them: the keys of a dict that the model returns.
    """
    bound = bind(model, mapping, "cfg.model")
    call, loss_bound = bound_criterion(criterion, loss_mapping, training, outputs or output_keys)
    return pure_loss(Functional(model, training=training), bound, call, loss_bound, output_keys)


def bound_criterion(
    criterion: Any, mapping: Mapping[str, str], training: bool, outputs: Sequence[str] = OUTPUT_KEYS
) -> tuple[Any, Binding | None]:
    """The criterion as a function of (params, buffers, kwargs), and how its parameters are bound.

    A parameter gets the field of its own name, with two exceptions. `input` is the model's first output, as in torch's own
    losses, unless another parameter has the name of an output. `weight` is the batch's field "weight" where there is one, else
    the weights of the samples: 0 for padding. torch's losses are asked for per-sample values where that is the same mathematics.
    """
    if criterion is None:
        return None, None
    weight: Sequence[str] = ("weight", WEIGHT)
    call: Any = criterion
    if isinstance(criterion, nn.Module):
        builtin = type(criterion).__module__.startswith("torch.")
        call = Functional(criterion, training=training, prefix=LOSS_PREFIX, via=maskable if builtin else None)
        weight = (WEIGHT,) if builtin else weight
    elif str(getattr(getattr(criterion, "func", criterion), "__module__", "")).startswith("torch."):
        weight = ()  # of a function of torch: class weights
    called = call.call if isinstance(call, Functional) else criterion
    defaults: dict[str, Sequence[str]] = {"weight": weight}
    if not any(name in outputs for name in bind(called, mapping, "cfg.loss").names):
        defaults["input"] = (outputs[0], "input")
    bound = bind(called, mapping, "cfg.loss", defaults=defaults)
    return call if isinstance(call, Functional) else lambda params, buffers, kwargs: criterion(**kwargs), bound
