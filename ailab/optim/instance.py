"""An object of a `torch.optim.Optimizer` class, made without importing torch's compiler."""

from __future__ import annotations

import inspect
from typing import Any

import torch

_ADD = torch.optim.Optimizer.add_param_group


def instance(cls: type[torch.optim.Optimizer], params: Any, **hyper: Any) -> torch.optim.Optimizer:
    """`cls(params, **hyper)`. A run that does not compile need not wait for `torch._dynamo`, as long as `import torch` itself.

    The constructor calls `add_param_group`, and torch wraps that so that Dynamo does not trace it: the first call imports
    Dynamo. Here, where nothing is traced, the constructor is given the wrapped function. A class with an `add_param_group` of
    its own keeps that.
    """
    if cls.add_param_group is not _ADD:
        return cls(params, **hyper)
    made = cls.__new__(cls)
    vars(made)["add_param_group"] = inspect.unwrap(_ADD).__get__(made)
    try:
        cls.__init__(made, params, **hyper)
    finally:
        del vars(made)["add_param_group"]
    return made
