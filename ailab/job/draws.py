"""Where a step draws random numbers: a graph over several ranks has one generator, and can serve one place only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ailab.rng import generator_states
from ailab.types import Aux, Batch, Grad, Params, TrainState


@dataclass
class Draws:
    """Whether a step draws random numbers: in the gradient core, below its reduction over ranks, and around it."""

    device: torch.device
    below: bool = False
    above: bool = False
    _seen: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def begin(self) -> None:
        """What is drawn from now on counts."""
        self._seen = generator_states(self.device)

    def core(self, grad: Grad) -> Grad:
        """The core, watched."""

        def watched(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            self.above |= self.drawn()
            result = grad(state, batch)
            self.below |= self.drawn()
            return result

        return watched

    def drawn(self) -> bool:
        """Whether any number was drawn since the last time that this was asked."""
        before, self._seen = self._seen, generator_states(self.device)
        return not all(torch.equal(a, b) for a, b in zip(before, self._seen, strict=True))
