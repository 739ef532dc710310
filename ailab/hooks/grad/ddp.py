"""DDPHook: how gradients are all-reduced with several processes. With one process it does nothing."""

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
    """Settings of the gradient all-reduce, and a barrier at the start and at the end of the run.

    Args:
        bucket_cap_mb: size of a gradient bucket in MiB. For `dist.sync` "ddp" and "graph".
        static_graph: promise that every step uses the same parameters. For "ddp" only.
        find_unused_parameters: search for parameters without a gradient in every step. This walks the graph. For "ddp" only.
        gradient_as_bucket_view: gradients are views of the buckets, which saves a copy. For "ddp" only. None: True, unless a
            grad hook keeps one gradient while it computes another.
        compress: send and sum gradients in this dtype. Half the bytes, at the precision of that dtype.
        split_compiled: compile the loss of "ddp" in parts, one for each bucket. Then the all-reduce overlaps with the backward
            pass, but no operations are fused across parts. Useful between machines. On one machine the all-reduce is usually
            too short for it to pay.

    Raises:
        ConfigError: for a bucket size that is not positive, or below 1 MiB with `split_compiled`.
    """
    if not bucket_cap_mb > 0:
        raise ConfigError(f"cfg.hooks.{name}.bucket_cap_mb is {bucket_cap_mb}; it must be more than 0 MiB.")

    if split_compiled and bucket_cap_mb < 1:
        raise ConfigError(f"cfg.hooks.{name}.bucket_cap_mb is {bucket_cap_mb}; with split_compiled it must be at least 1 MiB.")

    def wrap(run: Run) -> Run:
        def with_barriers(state: TrainState) -> TrainState:
            dist.barrier()
            state = run(state)
            dist.barrier()
            return state

        return with_barriers

    shared = {"bucket_cap_mb": bucket_cap_mb, "compress": _DTYPES[compress]}
    ddp = {"static_graph": static_graph, "find_unused_parameters": find_unused_parameters, "split_compiled": split_compiled}
    if gradient_as_bucket_view is not None:
        ddp["gradient_as_bucket_view"] = gradient_as_bucket_view
    role = "result" if compress else "observer"
    return Middleware(name, wrap, "run", role=role, core={"ddp": {**shared, **ddp}, "graph": shared})
