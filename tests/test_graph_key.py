"""What a graph is kept for: everything outside a step that its code depends on. The oracle is the eager step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import compile
from ailab.compiler import Settings
from ailab.core.epoch import eval_epoch, tally
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.step import eval_step, train_step
from ailab.errors import ConfigError
from ailab.optim import build_optimizer
from ailab.stack import Middleware, stack, with_slots
from ailab.types import Batch, Mean, TrainState


def made(model: nn.Module, criterion: Any = None, hooks: Any = (), **options: Any) -> tuple[Any, TrainState]:
    state = module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    state = with_slots(state.replace(opt_state=optimizer.init(state.params)), hooks)
    bare = train_step(local_grad(loss_of(model, criterion or nn.CrossEntropyLoss())), optimizer)
    return compile(stack(bare, hooks), donate=False, **options), state


def batch_of(features: int = 64) -> Batch:
    gen = torch.Generator().manual_seed(0)
    return {"input": torch.randn(6, features, generator=gen), "target": torch.randint(3, (6,), generator=gen)}


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to another dtype": lambda: torch.autocast("cpu", dtype=torch.float16),
    "matmul precision": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "determinism": lambda: changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, torch.get_num_threads() + 1),
    "default dtype": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("cpu"),
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_settings_of_torch_that_code_depends_on_are_told_apart(name: str) -> None:
    """Each global setting that torch's guards hold has a key of its own, and the old key when it is undone."""
    settings, device = Settings(), torch.device("cpu")
    before = settings(device)
    with SETTINGS[name]():
        inside = settings(device)
        assert settings(device) == inside
    assert inside != before
    assert settings(device) == before


def test_each_setting_runs_a_graph_of_its_own(aot_eager: None) -> None:
    """Under autocast and without, in turns, the compiled step gives the eager losses, in two graphs."""
    lines: list[str] = []
    (step, state), (eager, _) = made(nn.Linear(64, 3), report=lines.append), made(nn.Linear(64, 3), enabled=False)
    for _ in range(2):
        for on in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                torch.testing.assert_close(step(state, batch_of())[1].packed, eager(state, batch_of())[1].packed)
    assert len(step.graphs) == 2
    assert lines == [
        "train step: compiled graph 2, for other settings of torch (autocast, precision, determinism, threads, ...)"
    ]


class Imaginary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return ((input.imag if input.is_complex() else input) * self.w).sum(1)


def test_conjugated_and_negated_values_are_read_as_such(aot_eager: None) -> None:
    """A field that is a lazy conjugate, or the imaginary part of one, gives the eager parameters, whichever came first."""
    square = lambda output, target: (output - target) ** 2
    x, target = torch.complex(torch.randn(5, 3), torch.randn(5, 3)), torch.ones(5)
    fields = [x, x.conj(), x.imag, x.conj().imag]
    assert [v.is_conj() or v.is_neg() for v in fields] == [False, True, False, True]
    for order in (fields, fields[::-1]):
        (step, state), (eager, _) = made(Imaginary(), square), made(Imaginary(), square, enabled=False)
        for v in order:
            batch = {"input": v, "target": target}
            torch.testing.assert_close(step(state, batch)[0].params["w"], eager(state, batch)[0].params["w"])


def test_a_batch_on_another_device_is_refused(aot_eager: None) -> None:
    """A batch that was not moved to the state's device is an error that names the field and both devices."""
    step, state = made(nn.Linear(64, 3))
    step(state, batch_of())
    with pytest.raises(ConfigError, match=r"the batch's 'input' is on meta, and the state on cpu"):
        step(state, {n: v.to("meta") for n, v in batch_of().items()})


def test_a_state_with_other_leaves_gets_a_graph_of_its_own(aot_eager: None) -> None:
    """States with and without a further slot run in turns, each in its own graph, with the eager parameters."""
    (step, state), (eager, _) = made(nn.Linear(64, 3)), made(nn.Linear(64, 3), enabled=False)
    more = state.with_slot("more", {"a": torch.ones(2)})
    for some in (state, more, state, more):
        after, right = step(some, batch_of())[0], eager(some, batch_of())[0]
        assert [p for p, _ in tree.items(after)] == [p for p, _ in tree.items(some)]
        for n in after.params:
            torch.testing.assert_close(after.params[n], right.params[n])
    assert len(step.graphs) == 2


@pytest.mark.parametrize("value", [{"a": torch.zeros(()), "b": torch.zeros(())}, {"a": torch.zeros(3)}, {}])
@pytest.mark.parametrize("donate", [True, False])
def test_a_step_that_changes_the_structure_of_the_state_is_refused(donate: bool, value: Any, aot_eager: None) -> None:
    """A slot that comes out with more, fewer or other tensors is an error, and not a broadcast into the old one."""

    def growing(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        return state.replace(step=state.step + 1, slots={"s": {n: v.clone() for n, v in value.items()}}), {}

    state = TrainState(torch.zeros((), dtype=torch.int64), {}, {}, {}, {"s": {"a": torch.zeros(1)}})
    with pytest.raises(ConfigError, match="changes the structure of the state"):
        compile(growing, donate=donate)(state, {})


@pytest.mark.parametrize("plain", [0, 0.5, True])
def test_a_plain_number_in_a_slot_is_refused(plain: Any) -> None:
    """A hook that keeps a Python number is refused before the first step: eager would count it, and a graph would not."""
    counting = Middleware("n", lambda step: step, "step", lambda state: {"seen": plain})
    with pytest.raises(ConfigError, match=rf"hook 'n' keeps a plain number in its memory, seen = {plain}.*\n.*0-d tensor"):
        made(nn.Linear(4, 3), hooks=[counting])


# ---- evaluation


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.rand(3)


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_evaluation_does_not_advance_the_clock(enabled: bool, donate: bool, aot_eager: None) -> None:
    """After steps of evaluation `state.at` is `state.step`: the number of optimizer updates."""
    model = nn.Linear(64, 3)
    state = with_slots(module_state(model).clone(), [tally(["loss"])])
    state = state.replace(step=state.step + 7)
    step = compile(
        stack(eval_step(loss_of(model, nn.CrossEntropyLoss(), training=False)), [tally(["loss"])]),
        enabled=enabled,
        donate=donate,
    )
    for _ in range(3):
        state, _ = step(state, batch_of())
        assert state.at == int(state.step) == 7


def test_what_evaluation_draws_depends_on_seed_step_and_batch_alone(aot_eager: None) -> None:
    """The draws of an evaluation are the same for any `donate`, again, and from a clone; other batches and steps draw others."""
    model = Noisy(64, 3)
    seen: list[list[Tensor]] = []

    def evaluated(state: TrainState, **options: Any) -> list[Tensor]:
        logs: list[Tensor] = []

        def spied(step: Any) -> Any:
            def spying(state: TrainState, batch: Batch) -> Any:
                state, out = step(state, batch)
                logs.append(out.packed.clone())
                return state, out

            return spying

        bare = stack(eval_step(loss_of(model, nn.CrossEntropyLoss(), training=False)), [tally(["loss"])])
        eval_epoch(spied(compile(bare, **options)), ["loss"])(state, [batch_of()] * 3)
        return logs

    state = module_state(model).clone()
    seen += [evaluated(state, enabled=enabled, donate=donate) for enabled in (True, False) for donate in (True, False)]
    seen.append(evaluated(state.clone(), enabled=False, donate=True))
    for other in seen[1:]:
        torch.testing.assert_close(torch.stack(other), torch.stack(seen[0]))
    assert not torch.equal(seen[0][0], seen[0][1])
    later = evaluated(state.replace(step=state.step + 1), enabled=False, donate=True)
    assert not torch.equal(later[0], seen[-1][0])
