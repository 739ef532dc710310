"""DDPHook: how gradients are synchronised when there are several processes; harmless with one."""

from __future__ import annotations

from typing import Literal

import torch

from ailab import dist
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Run, TrainState

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


@HOOKS.register_module()
def DDPHook(
    bucket_cap_mb: float = 25.0,
    static_graph: bool = False,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool | None = None,
    compress: Literal["bf16", "fp16"] | None = None,
    split_compiled: bool = False,
    name: str = "ddp",
) -> Middleware[Run]:
    """How gradients travel when there are several processes, and a barrier at both ends of the run.

    Args:
        bucket_cap_mb: size of a gradient bucket, MiB; for `dist.sync` "ddp" and "graph" alike.
        static_graph: the same parameters are used in every step; "ddp" only, as the next two.
        find_unused_parameters: look for parameters without a gradient in every step; costs a walk of the graph.
        gradient_as_bucket_view: gradients are the buckets themselves, which saves a copy of them. None: where no grad hook holds
            one gradient while it computes another.
        split_compiled: compile the loss of "ddp" in parts, one for each bucket: their sums run under the backward, and nothing is
            fused across a cut. Pays between machines; on one, the sums of a whole compiled backward are over before it would.
        compress: send and sum gradients in this dtype: half the bytes, and its rounding.
        name: of this hook.

    Raises:
        ConfigError: for a bucket size that is not positive, or less than 1 MiB with `split_compiled`.
    """
    if not bucket_cap_mb > 0:
        raise ConfigError(f"cfg.hooks.{name}.bucket_cap_mb is {bucket_cap_mb}; a bucket holds more than 0 MiB.")

    if split_compiled and bucket_cap_mb < 1:
        raise ConfigError(f"cfg.hooks.{name}.bucket_cap_mb is {bucket_cap_mb}; with split_compiled the least is 1.0 (MiB).")

    def wrap(run: Run) -> Run:
        def together(state: TrainState) -> TrainState:
            dist.barrier()
            state = run(state)
            dist.barrier()
            return state

        return together

    both = {"bucket_cap_mb": bucket_cap_mb, "compress": _DTYPES[compress]}
    ddp = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters, "split_compiled": split_compiled}
    if gradient_as_bucket_view is not None:
        ddp["gradient_as_bucket_view"] = gradient_as_bucket_view
    return Middleware(name, wrap, "run", core={"ddp": {**both, **ddp}, "graph": both})
