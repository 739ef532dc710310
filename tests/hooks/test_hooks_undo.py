"""Steps that are skipped inside the graph, runs that end because of them, and hooks at the wrong depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import OWN, info, made
from tiny import newest_content, tiny_cfg
from torch.utils._python_dispatch import TorchDispatchMode

from ailab.compile import compile
from ailab.config import check
from ailab.errors import ConfigError, NonFiniteError, SpikeError
from ailab.fit import fit
from ailab.hooks import AMPHook, SkipNonFiniteHook, SpikeHook
from ailab.job.assemble import assemble
from ailab.stack import Middleware, at, stack
from ailab.testing import TinyNet, check_identity
from ailab.types import Batch, Mean, Step, TrainState

INPUT = TinyNet().batches[0]["input"]


def losing(values: list[float], hook: Any, *, host: bool = False) -> list[tuple[TrainState, Any]]:
    """The states and logs of steps whose losses are `values`, one parameter that counts the updates, and the hook around them."""

    def step(state: TrainState, batch: Batch) -> Any:
        loss = torch.tensor(values[int(state.step)])
        return state.replace(step=state.step + 1, params={"w": state.params["w"] + 1}), {"loss": Mean(loss, torch.ones(()))}

    hooks = hook if isinstance(hook, list) else [hook]
    whole = stack(step, at(hooks, "step"))
    if host:
        whole = stack(compile(whole, enabled=False), at(hooks, "host"))
    state = TrainState(torch.tensor(0), {"w": torch.zeros(())}, {}, {}, {})
    state = state.with_slot("spike", next(h.init for h in hooks if h.init)(state))
    out = []
    for _ in values:
        state, logs = whole(state, {"input": INPUT})
        out.append((state, logs))
    return out


NOISE = [2.0 + 0.1 * math.sin(7 * i) for i in range(20)]


def by_hand(values: list[float], threshold: float, window: int) -> list[bool]:
    """Which of them are spikes, with a list."""
    recent: list[float] = []
    found = []
    for v in values:
        if not math.isfinite(v):
            found.append(False)
            continue
        last = torch.tensor(recent[-window:])
        full = len(recent) >= window
        bound = float(last.mean() + threshold * max(float(last.std()), 0.01 * abs(float(last.mean())))) if full else math.inf
        found.append(v > bound)
        recent.append(min(v, bound))
    return found


@pytest.mark.parametrize(
    "values",
    [
        [*NOISE, 9.0, *NOISE],
        [*NOISE, math.nan, 9.0, math.inf, *NOISE[:5], 2.6, *NOISE],
        [9.0, *NOISE],
        [*NOISE, *[6.0] * 20],  # a new level: spikes until the window has followed
        [1.0] * 12 + [1.02] + [1.2],
    ],
)
@pytest.mark.parametrize("policy", ["log", "skip"])
def test_spikes_are_those_found_by_hand(policy: Any, values: list[float]) -> None:
    """The flags are those of a plain list of recent losses. NaN and inf do not enter it and are no spikes. "skip" skips them."""
    seen = losing(values, SpikeHook(policy, threshold=6.0, window=10))
    flags = [bool(logs["spike"].value) for _, logs in seen]
    assert flags == by_hand(values, 6.0, 10)
    last, _ = seen[-1]
    assert torch.isfinite(last.slots["spike"]["losses"]).all()
    assert int(last.step) == len(values)
    assert float(last.params["w"]) == len(values) - (sum(flags) if policy == "skip" else 0)
    assert int(last.slots["spike"]["first"]) == (flags.index(True) + 1 if any(flags) else 0)
    for flag, (_, logs) in zip(flags, seen, strict=True):
        assert float(logs["loss"].weight) == (0 if flag and policy == "skip" else 1)


def test_a_lasting_change_is_followed() -> None:
    """The loss at a new level is a spike for a while, and then it is the level."""
    flags = [bool(logs["spike"].value) for _, logs in losing([*NOISE, *[6.0] * 40], SpikeHook(window=10))]
    assert flags[20]
    assert not any(flags[40:])


def test_a_spike_ends_the_run_where_asked() -> None:
    """policy="raise" skips the step, and the next check on the host names it."""
    with pytest.raises(
        SpikeError, match=r"the loss of step 21 was more than 6 standard deviations above the mean of the 10 steps before"
    ):
        losing([*NOISE, 9.0, *NOISE], SpikeHook("raise", window=10, every=5), host=True)
    state, _ = losing([*NOISE, 9.0, *NOISE], [h for h in SpikeHook("raise", window=10) if h.depth == "step"])[-1]
    assert float(state.params["w"]) == 40


@pytest.mark.parametrize("policy", ["log", "skip"])
def test_no_loss_is_above_infinity(policy: Any) -> None:
    """spike(inf) leaves parameters, buffers and momentum bitwise alone, under every policy."""
    check_identity(SpikeHook(policy, threshold=math.inf, window=2))


def poisoned(*steps: int, by: float = math.nan) -> Any:
    """A hook whose batches are multiplied by a number in these steps, counted from 1."""

    def build() -> Middleware[Any]:
        def wrap(step: Step) -> Step:
            def poisoning(state: TrainState, batch: Batch) -> Any:
                if state.at + 1 in steps:
                    batch = {**batch, "input": batch["input"] * by}
                return step(state, batch)

            return poisoning

        return Middleware("poison", wrap, "host")

    return build


@pytest.mark.parametrize("by", [math.nan, 1e25], ids=["nan", "huge"])  # its variance is infinite, its gradient is not
@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_step_that_is_not_finite_ends_the_run_and_changes_nothing(every: int, by: float, tmp_path: Path) -> None:
    """By default the run ends at the next check or at the end of the epoch. The error names the step. Nothing has changed."""
    hooks = dict(nonfinite=dict(type="SkipNonFiniteHook", every=every), poison=dict(type=poisoned(7, by=by)))
    saved = dict(checkpoint=dict(type="CheckpointHook", every_steps=1))
    with pytest.raises(NonFiniteError, match=r"step 7 is not finite, .* It was skipped: nothing has changed"):
        fit(tiny_cfg(tmp_path, **hooks, **saved))
    state = newest_content(tmp_path)["state"]
    assert all(torch.isfinite(t).all() for t in [*state["params"].values(), *state["buffers"].values()])
    assert int(state["step"]) == {1: 6, 4: 7, 100: 9}[every]  # the look comes before the checkpoint of its step


def test_skipped_steps_change_nothing(tmp_path: Path) -> None:
    """policy="skip" continues, counts the steps, and ends the run after `max_in_a_row` of them in a row."""
    hooks = dict(nonfinite=dict(type="SkipNonFiniteHook", policy="skip", max_in_a_row=3, every=1))
    result = fit(tiny_cfg(tmp_path / "a", **hooks, poison=dict(type=poisoned(3, 4, 9))))
    assert result.state.at == 15
    assert all(torch.isfinite(p).all() for p in result.state.params.values())
    assert int(result.state.slots["nonfinite"]["longest"]) == 2
    with pytest.raises(NonFiniteError, match="3 steps in a row were not finite"):
        fit(tiny_cfg(tmp_path / "b", **hooks, poison=dict(type=poisoned(3, 4, 5))))


def test_a_row_that_ended_before_the_check_counts() -> None:
    """A row of skipped steps that begins and ends between two checks ends the run too."""
    net = TinyNet(SkipNonFiniteHook("skip", max_in_a_row=2, every=6))
    step = stack(compile(net.step(), enabled=False), at(net.hooks, "host"))
    bad = {**net.batches[0], "input": INPUT * float("nan")}
    state = net.state.clone()
    for batch in (net.batches[0], bad, bad, net.batches[0], net.batches[1]):
        state, _ = step(state, batch)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        step(state, net.batches[0])


def test_an_overflow_of_the_loss_scale_is_no_failure(tmp_path: Path) -> None:
    """With AMPHook listed before, an overflow halves the loss scale and does not end the run."""
    run = info(tmp_path)
    scaled = [h for h in AMPHook("fp16", init_scale=2.0**127, run=run) if h.depth != "loss"]
    net = TinyNet([*scaled, *SkipNonFiniteHook(every=1)])
    step = stack(compile(net.step(), enabled=False), at(net.hooks, "host"))
    state = net.state.clone()
    scales = []
    for i in range(12):
        state, _ = step(state, {**net.batches[i % 2], "input": 100 * net.batches[i % 2]["input"]})
        scales.append(float(state.slots["amp"]["scale"]))
    assert scales[0] == 2.0**126  # the first one overflowed
    assert not torch.equal(state.params["0.weight"], net.state.params["0.weight"])
    bad = {**net.batches[0], "input": INPUT * float("nan")}
    state, _ = step(state, bad)  # indistinguishable from an overflow: the scale takes the blame, as in GradScaler
    assert float(state.slots["amp"]["scale"]) == scales[-1] / 2


def test_an_overflow_may_not_be_hidden_from_the_loss_scale(tmp_path: Path) -> None:
    """With fp16, SkipNonFiniteHook before AMPHook is a ConfigError that gives the order."""
    cfg = tiny_cfg(tmp_path, skip=dict(type="SkipNonFiniteHook"), amp=dict(type="AMPHook", dtype="fp16"))
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.amp: with fp16 it must be listed before 'skip'"):
        assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SkipNonFiniteHook("ignore"), r"cfg\.hooks\.skip_nonfinite\.policy is 'ignore'"),  # type: ignore[arg-type]
        (lambda: SkipNonFiniteHook(max_in_a_row=0), r"max_in_a_row is 0"),
        (lambda: SkipNonFiniteHook(every=0), r"cfg\.hooks\.skip_nonfinite\.every is 0"),
        (lambda: SpikeHook("stop"), r"cfg\.hooks\.spike\.policy is 'stop'"),  # type: ignore[arg-type]
        (lambda: SpikeHook(threshold=0.0), r"threshold=0\.0 must be positive"),
        (lambda: SpikeHook(window=1), r"window=1 at least 2"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    """A setting that makes no sense is a ConfigError when the hook is built."""
    with pytest.raises(ConfigError, match=message):
        build()


class Reads(TorchDispatchMode):
    """Counts the values that Python reads off a tensor: each would stall a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def reads(hooks: list[Any], steps: int) -> int:
    """How many values a training loop of so many steps reads, in the traced and the host hooks."""
    net = TinyNet(hooks)
    net.optimizer = TinyNet().optimizer
    step = stack(compile(net.step(), enabled=False), at(net.hooks, "host"))
    state = net.state.clone()
    state.at  # noqa: B018 # read once, at the start of a run
    with Reads() as counted:
        for i in range(steps):
            state, _ = step(state, net.batches[i % 2])
    return counted.count


@pytest.mark.parametrize("name", [n for n in OWN if n not in ("LoggerHook", "TensorboardHook", "WandbHook")])
def test_no_hook_reads_the_device_between_its_checks(name: str, tmp_path: Path) -> None:
    """In 9 steps, before the first check of hooks that check every 10 steps, no hook reads a value."""
    hooks = made(name, tmp_path)
    if not any(h.depth in ("loss", "grad", "step", "host") for h in hooks):
        assert hooks == [] or {h.depth for h in hooks} <= {"epoch", "run"}
        return
    assert reads(hooks, 9) == reads([], 9)


@pytest.mark.parametrize("hooks", [SkipNonFiniteHook(every=3), SpikeHook("raise", every=3)])
def test_a_check_is_one_read(hooks: list[Any]) -> None:
    """A hook that checks every 3 steps reads one value at each check."""
    assert reads(hooks, 9) == reads([], 9) + 3


def assembled(hook: Any, folder: Path) -> None:
    def Mine() -> Any:
        return hook

    assemble(check.complete(tiny_cfg(folder, mine=dict(type=Mine))), torch.device("cpu"), say=lambda line: None)


def doubles(grad: Any) -> Any:
    """What a grad hook does."""

    def doubled(state: Any, batch: Any) -> Any:
        grads, aux = grad(state, batch)
        return {n: 2 * g for n, g in grads.items()}, aux

    return doubled


def prints(step: Any) -> Any:
    """What a host hook does."""

    def printed(state: Any, batch: Any) -> Any:
        state, logs = step(state, batch)
        print(logs.values_as_floats())
        return state, logs

    return printed


def measures(loss: Any) -> Any:
    """What a loss hook returns, at the depth of steps."""

    def measured(state: Any, batch: Any) -> Any:
        from ailab.types import Aux

        loss(state, batch)
        return torch.zeros(()), Aux({}, torch.ones(()), {})

    return measured


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (Middleware("mine", doubles, "step"), r"cfg\.hooks\.mine failed at depth 'step'.*returns \(TrainState, logs by name\)"),
        (Middleware("mine", prints, "step"), r"cfg\.hooks\.mine failed at depth 'step'.*\n.*belongs at 'host'"),
        (
            Middleware("mine", prints, "loss"),
            r"cfg\.hooks\.mine failed at depth 'loss', where it is given params, buffers, batch",
        ),
        (
            Middleware("mine", measures, "step"),
            r"returned \(Tensor, Aux\) and not \(TrainState, logs by name\)\.\n"
            r"  That is what a hook at 'loss' returns: Middleware\(name, wrap, 'loss'\)",
        ),
        (Middleware("mine", lambda f: lambda s, b: f(s, b)[0], "step"), r"returned \(TrainState\) and not"),
        (Middleware("mine", lambda f: None, "grad"), r"its wrap returned NoneType; it has to return the function"),  # type: ignore[arg-type]
        (Middleware("mine", doubles, "batch"), r"there is no depth 'batch'"),  # type: ignore[arg-type]
        (doubles, r"returned function, not a Middleware"),
    ],
)
def test_a_hook_at_the_wrong_depth_is_an_error_that_names_the_right_one(hook: Any, message: str, tmp_path: Path) -> None:
    """What a hook returns or raises on the shrunk first step is a ConfigError with its path, its depth and what belongs there."""
    with pytest.raises(ConfigError, match=message):
        assembled(hook, tmp_path)


def test_a_hook_is_not_blamed_for_what_is_inside_it(tmp_path: Path) -> None:
    """An error of the model reaches the user as the model's, through the hooks around it."""

    def broken(loss: Any) -> Any:
        def failing(*args: Any) -> Any:
            raise RuntimeError("from within")

        return failing

    cfg = tiny_cfg(
        tmp_path, inner=dict(type=lambda: Middleware("inner", broken, "loss")), clip=dict(type="GradClipHook", max_norm=1.0)
    )
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.inner failed at depth 'loss'(.|\n)*RuntimeError: from within"):
        assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
