"""The communication of a step: how many messages, when, in which dtype; and all ranks stop at the same step."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from ranks import CORES, built, compared, config, distance, trained
from torch import Tensor, nn

from ailab import dist, tree
from ailab.build import loss_of
from ailab.compile import compile, overlap_options
from ailab.core.epoch import Interrupted
from ailab.core.grad import _bucketed, ddp_grad
from ailab.core.loss import module_state
from ailab.dist import group
from ailab.errors import ConfigError
from ailab.hooks import DDPHook
from ailab.stack import Middleware
from ailab.types import RunInfo, TrainState

ACCUMULATE = dict(type="GradAccumulateHook", n=3)
CLIP = dict(type="GradClipHook", max_norm=0.3)


class Counted:
    """A context in which the dtypes and sizes of all calls of `torch.distributed.all_reduce` are listed."""

    def __enter__(self) -> list[tuple[torch.dtype, int]]:
        self.whole, self.sent = group.td.all_reduce, []

        def all_reduce(tensor: Tensor, *args: Any, **more: Any) -> Any:
            self.sent.append((tensor.dtype, tensor.numel()))
            return self.whole(tensor, *args, **more)

        group.td.all_reduce = all_reduce
        return self.sent

    def __exit__(self, *_: object) -> None:
        group.td.all_reduce = self.whole


def sent_in_steps(cfg: dict[str, Any]) -> list[list[tuple[torch.dtype, int]]]:
    """The dtype and size of each all-reduce, for each training step of a run."""
    steps: list[list[tuple[torch.dtype, int]]] = []

    def extra(run: RunInfo) -> list[Middleware[Any]]:
        def wrap(step: Any) -> Any:
            def watched(state: TrainState, batch: Any) -> Any:
                before = len(sent)
                result = step(state, batch)
                steps.append(sent[before:])
                return result

            return watched

        return [Middleware("sent", wrap, "host")]

    with Counted() as sent:
        job = built(cfg, extra=extra)
        job.run(job.state)
    return steps


PARAMETERS = 6 * 16 + 16 + 16 * 4 + 4
CONTROL = 1 + 2 * 2 + 1  # the control message: the weight, the sums and weights of loss and top1, the stop flag
ROOM = {"ddp": 16, "graph": CONTROL}  # DDP's bucket has room for a multiple of 16 numbers


@pytest.mark.parametrize("sync", CORES)
def test_a_step_sends_one_bucket_with_the_control_message(ranks: Any, sync: str) -> None:
    """Weight, logs and stop flag are sent with the gradients, with any hooks; a single micro-batch sends nothing."""
    skip = dict(type="SkipNonFiniteHook")
    for hooks in ({}, dict(accumulate=ACCUMULATE), dict(accumulate=ACCUMULATE, clip=CLIP, skip=skip)):
        for steps in ranks(2)(sent_in_steps, config(sync=sync, hooks=hooks)):
            assert steps == [[(torch.float64, PARAMETERS + ROOM[sync])]] * 12


@pytest.mark.parametrize("sync", CORES)
def test_a_hook_under_the_micro_batches_sees_each_reduced(ranks: Any, sync: str) -> None:
    """With clip listed before accumulate, each micro-batch is reduced and clipped, as with one process."""
    cfg = config(sync=sync, hooks=dict(clip=CLIP, accumulate=ACCUMULATE), size=16, dataset=dict(), batch_size=12)
    assert all(len(step) == 3 for step in ranks(2)(sent_in_steps, cfg)[0])


@pytest.mark.parametrize("sync", CORES)
def test_buckets_are_as_large_as_asked(ranks: Any, sync: str) -> None:
    """A cap smaller than any parameter gives each its own message, in the reverse order of the parameters; the same numbers."""
    small = config(sync=sync, hooks=dict(ddp=dict(type="DDPHook", bucket_cap_mb=1e-5)))
    sizes = [[n for _, n in step] for step in ranks(2)(sent_in_steps, small)[0]]
    first = [16, 4] if sync == "ddp" else [4 + CONTROL]
    assert sizes[1:] == [[*first, 16 * 4, 16, 6 * 16]] * 11
    assert max(compared(ranks, 2, small)) < 1e-9


def test_buckets_of_a_graph() -> None:
    """Last first, one dtype each, filled up to the cap; a gradient that is larger than the cap goes alone."""
    sizes = {"a": 100, "b": 50, "c": 300, "d": 20, "e": 20}
    grads = {n: torch.zeros(size, dtype=torch.float64 if n == "b" else torch.float32) for n, size in sizes.items()}
    assert _bucketed(grads, 500 / 2**20) == [["e", "d"], ["c"], ["a"], ["b"]]
    assert _bucketed(grads, 1.0) == [["e", "d", "c", "a"], ["b"]]
    assert _bucketed({}, 1.0) == []


@pytest.mark.parametrize(("compress", "dtype", "error"), [("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-3)])
@pytest.mark.parametrize("sync", CORES)
def test_gradients_are_sent_in_half_precision(ranks: Any, sync: str, compress: str, dtype: torch.dtype, error: float) -> None:
    """Half the bytes; the ranks still agree bitwise; the parameters are those of one process up to the rounding of the dtype.

    The control message is sent apart and is not rounded.
    """
    cfg = config(sync=sync, model=dict(double=False), hooks=dict(ddp=dict(type="DDPHook", compress=compress)))
    sent = ranks(2)(sent_in_steps, cfg)[0][5]
    assert sorted(sent, key=str) == sorted([(dtype, PARAMETERS), (torch.float64, ROOM[sync])], key=str)
    assert 1e-5 < compared(ranks, 2, cfg, {**cfg, "hooks": {"metrics": cfg["hooks"]["metrics"]}})[0] < error


def Twice(name: str = "twice") -> Middleware[Any]:
    """A hook that keeps a gradient while it computes another one, at half the parameters, and returns their mean."""

    def wrap(grad: Any) -> Any:
        def averaged(state: TrainState, batch: Any) -> Any:
            first, aux = grad(state, batch)
            second, _ = grad(state.replace(params={n: p * 0.5 for n, p in state.params.items()}), batch)
            return {n: (g + second[n]) / 2 for n, g in first.items()}, aux

        return averaged

    return Middleware(name, wrap, "grad")


@pytest.mark.parametrize("sync", CORES)
def test_a_gradient_stays_as_it_was(ranks: Any, sync: str) -> None:
    """A gradient that a hook holds does not change when another one is computed."""
    assert max(compared(ranks, 3, config(sync=sync, hooks=dict(twice=dict(type=Twice))))) < 1e-9


def test_buckets_as_gradients_change_no_bit(ranks: Any) -> None:
    """gradient_as_bucket_view and static_graph save memory and time and leave every bit of the state."""
    found = set()
    for settings in ({}, dict(gradient_as_bucket_view=False), dict(gradient_as_bucket_view=True, static_graph=True)):
        cfg = config(hooks=dict(ddp=dict(type="DDPHook", **settings), clip=CLIP))
        found |= {run["bytes"] for run in ranks(2)(trained, cfg)}
    assert len(found) == 1


# The order of things in a backward.


class Deep(nn.Module):
    """Four layers that note when their backward has run."""

    events: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])

    def forward(self, input: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            input = layer(input).tanh()
            if input.requires_grad:
                input.register_hook(lambda grad, i=i: Deep.events.append(f"layer {i}"))
        return input


def timeline(parts: int) -> list[list[str]]:
    """The events of two gradients: the backwards of layers, and the begin of each all-reduce."""
    model, events = Deep(), Deep.events
    state = module_state(model).clone()
    loss = loss_of(model, nn.MSELoss())
    batch = {"input": torch.randn(8, 64), "target": torch.randn(8, 64)}
    core = ddp_grad(loss, state, bucket_cap_mb=0.01, sample=(loss, batch), numbers=64)
    whole, found = group.td.all_reduce, []

    def all_reduce(tensor: Tensor, *args: Any, **more: Any) -> Any:
        events.append(f"bucket of {tensor.numel()}")
        return whole(tensor, *args, **more)

    group.td.all_reduce = all_reduce
    try:
        for _ in range(2):
            events.clear()
            core.many(state, [batch] * parts)
            found.append(list(events))
    finally:
        group.td.all_reduce = whole
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_all_reduces_begin_before_the_backward_ends(ranks: Any, parts: int) -> None:
    """Each bucket is sent as soon as it is full, before the backward of the next layer; the first has the control message."""
    layer, first_layer = "bucket of 4160", "bucket of 4224"  # 64 * 64 + 64, and 64 numbers
    last = ["layer 3", first_layer, "layer 2", layer, "layer 1", layer, "layer 0", layer]
    alone_first = ["layer 3", "layer 2", "layer 1", "layer 0"] * (parts - 1)
    for first, second in ranks(2)(timeline, parts):
        assert first == second == [*alone_first, *last]


class Wide(nn.Module):
    """Four layers of 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(512, 512), nn.Tanh())], nn.Linear(512, 4))
        self.first = nn.Linear(6, 512)

    def forward(self, input: Tensor) -> Tensor:
        return self.layers(self.first(input))


def traced_backward(cfg: dict[str, Any]) -> tuple[list[str], dict[str, Tensor]]:
    """The compiled backwards and the all-reduces of one step, in the order of their begin; and the parameters after it.

    It reads the trace of a profiler. Compiled without code generation.
    """
    whole = torch.compile

    def compiled(fn: Any, **options: Any) -> Any:
        return whole(fn, **{**options, "backend": "aot_eager", "mode": None, "options": None})

    torch.compile = compiled
    try:
        job = built(cfg)
        step, batch = job.steps["train"], next(iter(job.streams["train"].epoch(0)))
        state, _ = step(job.state, batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            state, _ = step(state, batch)
    finally:
        torch.compile = whole
    names = {"CompiledFunctionBackward": "backward", "c10d::allreduce_": "sum"}
    seen = sorted((e.time_range.start, names[e.name]) for e in profiler.events() if e.name in names)
    return [name for _, name in seen], state.params


def test_a_compiled_loss_in_parts_keeps_the_overlap(ranks: Any) -> None:
    """With a loss compiled in parts, all-reduces begin between the backwards; compiled whole, after the only backward."""
    found = []
    for split in (False, True):
        hooks = dict(ddp=dict(type="DDPHook", bucket_cap_mb=1.0, split_compiled=split))
        cfg = config(16, hooks=hooks, compile=True, workflow=[dict(phase="train")]) | dict(model=dict(type=Wide))
        found += [ranks(2)(traced_backward, cfg)[0]]
    (whole, params), (parts, same) = found
    assert whole[0] == "backward"
    assert whole.count("backward") == 1
    assert whole.count("sum") > 2
    assert parts.count("backward") >= 3
    assert parts.index("sum") < len(parts) - 1 - parts[::-1].index("backward")
    assert distance(same, params) < 1e-5
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.ddp\.bucket_cap_mb is 0\.5; with split_compiled"):
        DDPHook(bucket_cap_mb=0.5, split_compiled=True)


# Stop.


def stopped_at(cfg: dict[str, Any], rank: int, ask: int) -> tuple[int, list[int]]:
    """The step at which a run stops, if rank `rank` alone sets its stop flag, at the `ask`-th call."""
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        return asked >= ask and dist.rank() == rank

    job = built(cfg, interrupted=interrupted)
    with pytest.raises(Interrupted) as stop:
        job.run(job.state)
    return stop.value.state.at, [int(leaf.sum()) for leaf in tree.leaves(stop.value.state.slots["progress"])]


@pytest.mark.parametrize("sync", CORES)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_stop_flag_of_one_rank_stops_all_at_the_same_step(ranks: Any, sync: str, rank: int) -> None:
    """A signal to one rank stops all of them after the same step, in training and in evaluation."""
    cfg = config(sync=sync, hooks=dict(accumulate=ACCUMULATE))
    assert ranks(3)(stopped_at, cfg, rank, 2) == [(2, [0, 0, 0])] * 3
    assert (
        ranks(3)(stopped_at, cfg, rank, 5) == [(4, [1, 3, 0])] * 3
    )  # in evaluation, which is short: after the step that follows
    long = config(sync=sync, val=60)  # 20 steps of evaluation: it ends in mid-evaluation, with nothing of it counted
    assert ranks(3)(stopped_at, long, rank, 5) == [(3, [0, 0, 0])] * 3


def test_overlap_options_are_those_of_this_torch() -> None:
    """The compiler takes them, and there is at least the pass that moves reductions."""
    assert overlap_options()["reorder_for_compute_comm_overlap"] is True
    known = torch._inductor.config.get_config_copy()
    assert all(type(known[name]) is bool for name in overlap_options())
    step = compile(lambda state, batch: (state.replace(step=state.step + 1), {}), overlap=True)
    state = TrainState(torch.zeros((), dtype=torch.int64), {}, {}, {})
    assert step(state, {"x": torch.ones(2)})[0].at == 1
