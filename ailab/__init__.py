"""ailab: a small functional deep-learning trainer. A run is one pure function of (cfg, seed, data)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ailab.fit import ailab_train as ailab_train
    from ailab.stack import Middleware as Middleware
    from ailab.types import Mean as Mean
    from ailab.types import Sum as Sum
    from ailab.types import TrainState as TrainState
    from ailab.workdir.checkpoint import get_target_module_state as get_target_module_state
    from ailab.workdir.checkpoint import remove_module_prefix as remove_module_prefix

# Looked up on first use, so that `import ailab` costs nothing.
_HOMES = {
    "Mean": "ailab.types",
    "Middleware": "ailab.stack",
    "Sum": "ailab.types",
    "TrainState": "ailab.types",
    "ailab_train": "ailab.fit",
    "get_target_module_state": "ailab.workdir.checkpoint",
    "remove_module_prefix": "ailab.workdir.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ailab' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
