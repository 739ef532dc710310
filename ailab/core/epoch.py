"""The bare epochs: fold a step over batches, and a workflow of phases as one epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ailab import dist
from ailab.errors import StopNow
from ailab.stack import Middleware
from ailab.types import DRAW, STOP, Batch, Batches, Epoch, Logs, Mean, Step, TrainState, seal

TOTALS = "totals"  # slot: the sums of the running epoch, (names, 2) float64, so that a resumed epoch reports exact means
_AGREE_EVERY = 16  # steps of evaluation between two agreements of the ranks on whether to stop
PROGRESS = "progress"  # slot: {"epoch": workflow epochs completed, "began": step at which the running one began, "stop": ended}


class Interrupted(Exception):
    """A request to stop was seen at a step boundary; `state` is whole and belongs to no step in flight."""

    def __init__(self, state: TrainState):
        super().__init__("interrupted")
        self.state = state


def tally(names: Sequence[str]) -> Middleware[Step]:
    """Add each step's logs to the epoch's totals in the state, below the compile line: no host work per step.

    Args:
        names: of the logs that the wrapped step gives, in its order.
    """

    def init(state: TrainState) -> torch.Tensor:
        return torch.zeros(len(names), 2, dtype=torch.float64, device=state.step.device)

    def wrap(step: Step) -> Step:
        def tallied(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            sealed = seal(logs, state.step.device)
            return state.with_slot(TOTALS, state.slots[TOTALS] + sealed.packed), sealed

        return tallied

    return Middleware(TOTALS, wrap, "step", init, ("train", "val", "test"), looks_back=False)


def _never() -> bool:
    return False


def train_epoch(step: Step, names: Sequence[str], interrupted: Callable[[], bool] = _never) -> Epoch:
    """Fold a tallied training step over the batches; the logs are the means over all steps of the epoch.

    The totals start from what the state holds, so an epoch that was cut in two reports what a whole one would.

    Raises:
        Interrupted: after a step at which `interrupted()` held on any rank, or at a signal while it waits for a batch; carries
            the state.
    """
    stop = Stop(interrupted)

    def epoch(state: TrainState, batches: Iterable[Batch]) -> tuple[TrainState, Logs]:
        try:
            for batch in batches:
                state, logs = step(state, stop.with_flag(batch, state.step.device))
                if stop.agreed(logs):
                    raise Interrupted(state)
        except StopNow as signal:
            raise Interrupted(state) if signal.waits else signal from None
        return state, Logs(tuple(names), state.slots[TOTALS].clone())

    return epoch


class _Late:
    """Reads a flag on a device without waiting for what the device was just asked to do: the one of the call before.

    On a CPU there is nothing to wait for, and the flag is that of this call. Every rank reads the same either way.
    """

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Any] | None = None

    def read(self, flag: Tensor) -> bool:
        """Whether the flag, () of any dtype, is not 0."""
        if flag.device.type != "cuda":
            return bool(flag)
        before, host = self._waiting, torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)  # a step may write its next flag into the same memory
        done = torch.cuda.Event()
        done.record()
        self._waiting = (host, done)
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


class Stop:
    """Whether the run ends after a step. The stop flags of all ranks are summed in the step's own reduction, so they agree."""

    def __init__(self, interrupted: Callable[[], bool]):
        self.interrupted = interrupted
        self._together = dist.world_size() > 1
        self._flags: dict[bool, Tensor] = {}
        self._late = _Late()

    def with_flag(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with this rank's stop flag in it."""
        if not self._together:
            return batch
        flag = self.interrupted()
        if flag not in self._flags:
            self._flags[flag] = torch.tensor(float(flag), device=device)
        return {**batch, STOP: self._flags[flag]}

    def agreed(self, logs: Mapping[str, Any]) -> bool:
        """Whether any rank set the flag; on CUDA that of the step before, since reading this one would wait for the device."""
        if not self._together:
            return self.interrupted()
        return self._late.read(logs.outputs[STOP]) if isinstance(logs, Logs) else False


def eval_epoch(step: Step, names: Sequence[str], interrupted: Callable[[], bool] = _never) -> Epoch:
    """Fold a tallied evaluation step over the batches, summed over ranks; the state comes back as it went in.

    What a step draws is a function of `(seed, state.step, number of the batch, rank)`: another one for each batch, and the same
    after a resume. Ranks exchange nothing in a step of evaluation, so they agree on whether to stop every 16 of them.
    """

    def epoch(state: TrainState, batches: Iterable[Batch]) -> tuple[TrainState, Logs]:
        zeros = torch.zeros(len(names), 2, dtype=torch.float64, device=state.step.device)
        working = state.replace(opt_state={}, slots={**state.slots, TOTALS: zeros})
        flag = False
        try:
            for i, batch in enumerate(batches, 1):
                working, _ = step(working, {**batch, DRAW: i})
                flag = interrupted() or flag
                if (dist.world_size() == 1 or i % _AGREE_EVERY == 0) and dist.any_rank(flag, state.step.device):
                    raise Interrupted(state)
        except StopNow as signal:
            raise Interrupted(state) if signal.waits else signal from None
        # A clone: the next epoch may count in the same memory.
        return state, Logs(tuple(names), dist.all_reduce(working.slots[TOTALS].clone()))

    return epoch


def workflow(phases: Mapping[str, Epoch]) -> Epoch:
    """The phases in order as one epoch over `{phase: batches}`; log names get the phase as prefix: "val_top1".

    Without a training phase it is no epoch of the model: the state stays.
    """

    def epoch(state: TrainState, batches: Batches) -> tuple[TrainState, Logs]:
        parts: list[Logs] = []
        for phase, run_phase in phases.items():
            state, logs = run_phase(state, batches[phase])
            parts.append(logs.prefixed(f"{phase}_"))
        # Only now, with every phase done, is the epoch complete: a run resumed before this point reports it again, once.
        return epoch_ended(state) if "train" in phases else state, Logs.join(parts)

    return epoch


def fresh_progress(device: torch.device) -> dict[str, torch.Tensor]:
    """The progress of a run that has not begun."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return {"epoch": zero, "began": zero.clone(), "stop": zero.clone()}


def epoch_ended(state: TrainState) -> TrainState:
    """The state after one more epoch, at which the next one begins."""
    return begun_anew(state.with_slot(PROGRESS, {**state.slots[PROGRESS], "epoch": state.slots[PROGRESS]["epoch"] + 1}))


def begun_anew(state: TrainState) -> TrainState:
    """A state at which an epoch begins: what was counted of the last one is gone."""
    slots: dict[str, Any] = {**state.slots, PROGRESS: {**state.slots[PROGRESS], "began": state.step.clone()}}
    if TOTALS in slots:
        slots[TOTALS] = torch.zeros_like(slots[TOTALS])
    return state.replace(slots=slots)


def epochs_done(state: TrainState) -> int:
    """Workflow epochs completed; one device read."""
    return int(state.slots[PROGRESS]["epoch"])


def began(state: TrainState) -> int:
    """At which step the running epoch began; one device read."""
    return int(state.slots[PROGRESS]["began"])


def ask_to_stop(state: TrainState, stop: bool = True) -> TrainState:
    """A state after which the run ends, or goes on; for epoch hooks (early stopping)."""
    return state.with_slot(
        PROGRESS, {**state.slots[PROGRESS], "stop": torch.full_like(state.slots[PROGRESS]["stop"], int(stop))}
    )


def stopped(state: TrainState) -> bool:
    """Whether a hook asked to end the run; one device read."""
    return bool(state.slots[PROGRESS]["stop"])
