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
) -> Loss:
    """A module and a criterion as one pure loss over named fields: `total, aux = loss(params, buffers, batch)`.

    Args:
        model: its `forward` is given the fields that `mapping` {parameter: field} names, or those of its parameters' names.
        criterion: a module or a callable; a torch.nn loss calls the model's output `input`. None: the model's output "loss".
        training: the mode of the modules.
        mapping: of the model.
        loss_mapping: of the criterion, over the batch and the model's outputs.
        output_keys: names of the model's outputs.
    """
    bound = bind(model, mapping, "cfg.model")
    call, loss_bound = bound_criterion(criterion, loss_mapping, training)
    return pure_loss(Functional(model, training=training), bound, call, loss_bound, output_keys)


def bound_criterion(criterion: Any, mapping: Mapping[str, str], training: bool) -> tuple[Any, Binding | None]:
    """The criterion as a function of (params, buffers, kwargs), and how its parameters are bound.

    torch's own losses call the model's output `input`, and are asked for per-sample values where that is the same mathematics.
    """
    if criterion is None:
        return None, None
    if not isinstance(criterion, nn.Module):
        return lambda params, buffers, kwargs: criterion(**kwargs), bind(
            criterion, mapping, "cfg.loss", defaults={"weight": WEIGHT}
        )
    builtin = type(criterion).__module__.startswith("torch.nn.")
    call = Functional(criterion, training=training, prefix=LOSS_PREFIX, via=maskable if builtin else None)
    defaults = {"input": OUTPUT_KEYS[0], "weight": WEIGHT} if builtin else {}
    return call, bind(call.call, mapping, "cfg.loss", defaults=defaults)
