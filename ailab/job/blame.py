"""Whose failure it is when a run of several ranks ends: another process's, and how far the run had come."""

from __future__ import annotations

from collections.abc import Mapping

from ailab import dist
from ailab.types import Batch, Mean, Run, Step, TrainState


class Blame:
    """Makes the failure of a run, where another process caused it, a `PeerError` that says how far the run had come."""

    def __init__(self) -> None:
        self.phase, self.at = "start", 0

    def step(self, step: Step, phase: str) -> Step:
        """`step`, watched."""

        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            self.phase, self.at = phase, state.at
            return step(state, batch)

        return watched

    def run(self, run: Run) -> Run:
        """`run`, explained."""

        def explained(state: TrainState) -> TrainState:
            with dist.peer_error_at(
                lambda: f"step {self.at + 1}" if self.phase == "train" else f"{self.phase} after step {self.at}"
            ):
                return run(state)

        return explained
