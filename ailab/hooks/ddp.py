"""DDPHook: how gradients are synchronised when there are several processes; harmless with one."""

from __future__ import annotations

from ailab import dist
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Run, TrainState


@HOOKS.register_module()
def DDPHook(
    bucket_cap_mb: float = 25.0, static_graph: bool = False, find_unused_parameters: bool = False, name: str = "ddp"
) -> Middleware[Run]:
    """Arguments of `torch.nn.parallel.DistributedDataParallel`, and a barrier at both ends of the run.

    Args:
        bucket_cap_mb: size of a gradient bucket, MiB.
        static_graph: the same parameters are used in every step.
        find_unused_parameters: look for parameters without a gradient in every step; costs a walk of the graph.
        name: of this hook.
    """

    def wrap(run: Run) -> Run:
        def together(state: TrainState) -> TrainState:
            dist.barrier()
            state = run(state)
            dist.barrier()
            return state

        return together

    ddp = {"bucket_cap_mb": bucket_cap_mb, "static_graph": static_graph, "find_unused_parameters": find_unused_parameters}
    return Middleware(name, wrap, "run", core={"ddp": ddp})
