"""The bare run: epochs until the last, from wherever the state stands."""

from __future__ import annotations

from collections.abc import Callable

from ailab.core.epoch import began, epochs_done, stopped
from ailab.types import Batches, Epoch, Run, TrainState


def run_epochs(epoch: Epoch, batches: Callable[[int, int], Batches], total_epochs: int) -> Run:
    """Epochs `epochs_done(state) .. total_epochs - 1`, the first from the middle where the state says so.

    Args:
        epoch: one workflow epoch.
        batches: `batches(epoch, start)`: the batches of that epoch, training from step `start` on; nothing is replayed.
        total_epochs: where the run ends.
    """

    def run(state: TrainState) -> TrainState:
        while (done := epochs_done(state)) < total_epochs and not stopped(state):
            state, _ = epoch(state, batches(done, state.at - began(state)))
        return state

    return run


def run_once(epoch: Epoch, batches: Callable[[int, int], Batches]) -> Run:
    """One workflow epoch that does not train, whatever epoch the state is of.

    Args:
        epoch: the workflow epoch.
        batches: as for `run_epochs`.
    """

    def run(state: TrainState) -> TrainState:
        return epoch(state, batches(0, 0))[0]

    return run
