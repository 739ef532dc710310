"""What each sample of an evaluation adds to the results, and the class scores: gathered on the host for `ailab.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ailab import dist
from ailab.metrics.class_report import are_class_scores, confusion_matrix
from ailab.stack import Middleware
from ailab.types import ALL_OUTPUTS, GIVEN, WEIGHT, Batch, Logs, Mean, Step, TrainState, batch_size, seal

_CELLS = 1 << 22  # numbers of the largest field times the rows that are computed at once
_CLASSES = 2048  # at most, of a confusion matrix
_SCORES = 1 << 28  # numbers of the scores that are kept, at most
_TOLERANCE = 1e-4  # of the sum of the rows against the total, relative to the sum of their magnitudes


class SampleValues:
    """Gathers over one phase what each sample adds to the total and to the weight of each `Mean`.

    A `Mean` is linear in the weights of the samples: of a batch in which one sample alone has a weight, it is what that sample
    adds. The loss depth is asked so for each sample, for all of a batch in one `vmap` over the weights. The outputs of the model
    are given: it is not called again. A result that does not obey the weights (a scalar loss) does not add up to its total, and
    has no values here.

    Args:
        phase: that is observed.
        places: the places in the epoch of this rank's samples, per batch, in order: (n,) int64 each.
    """

    def __init__(self, phase: str, places: Callable[[], Sequence[Tensor]]):
        self.phase, self.places = phase, places
        self.bare: Step | None = None  # the step of the phase without the compile line, set before the first batch
        self.names: tuple[str, ...] = ()
        self.failure = ""
        self._rows: list[Tensor] = []
        self._at: list[Tensor] = []
        self._sums = torch.zeros(0, 2, dtype=torch.float64)

    def hook(self) -> Middleware[Step]:
        """The middleware. It leaves state and logs as they are."""

        def wrap(step: Step) -> Step:
            def valued(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
                after, logs = step(state, batch)
                assert isinstance(logs, Logs)
                self._add(after, batch, logs)  # the state that went in may be consumed
                return after, logs

            return valued

        core = {"outputs": (ALL_OUTPUTS,)}
        return Middleware("sample_values", wrap, "host", phases=(self.phase,), role="observer", core=core)

    def _add(self, state: TrainState, batch: Batch, logs: Logs) -> None:
        number = len(self._at)
        real = real_rows(batch, self.places()[number])
        self._at.append(self.places()[number][real.nonzero().flatten()])
        if self.failure:
            return
        try:
            rows = self._of_batch(state, batch, logs.outputs)
        except Exception as e:  # whatever a user's loss or metric raises under vmap; the results themselves are there
            self.failure = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            return
        if not self._rows:
            self.names, self._sums = logs.names, torch.zeros(len(logs.names), 2, dtype=torch.float64)
        self._sums += logs.packed.cpu()
        self._rows.append(rows.cpu()[: len(real)][real])

    def _of_batch(self, state: TrainState, batch: Batch, outputs: Mapping[str, Any]) -> Tensor:
        """What each slot of a batch adds: (B, M, 2) float64."""
        assert self.bare is not None
        bare, size = self.bare, batch_size(batch)
        device = state.step.device
        weight = batch.get(WEIGHT, torch.ones(size, device=device))

        def means_of(alone: Tensor) -> Tensor:
            _, logs = bare(state, {**batch, WEIGHT: alone, GIVEN: dict(outputs)})
            means = [m for m in logs.values() if isinstance(m, Mean)]
            return torch.stack([torch.stack([m.total.double(), m.weight.double()]) for m in means])

        largest = max(v.numel() for v in [*batch.values(), *outputs.values()] if isinstance(v, Tensor))
        chunk = max(1, min(size, _CELLS // max(1, largest)))
        with torch.no_grad():
            return torch.func.vmap(means_of, chunk_size=chunk)(torch.diag(weight))

    def gathered(self, device: torch.device) -> tuple[Tensor, list[str]]:
        """The rows of all ranks in the order of the epoch, (N, M, 2) float64, and the names of the M results that have them."""
        failed = dist.any_rank(bool(self.failure), device)
        if failed or not self.names:
            return torch.zeros(0, 0, 2, dtype=torch.float64), []
        rows = torch.cat(self._rows)
        everyone = in_order(rows, torch.cat(self._at), device)
        sums = dist.all_reduce(self._sums.to(device)).cpu()
        off = (everyone.sum(0) - sums).abs() > _TOLERANCE * everyone.abs().sum(0) + 1e-12
        kept = [i for i, name in enumerate(self.names) if not bool(off[i].any()) and name]
        return everyone[:, kept], [self.names[i] for i in kept]


class ClassScores:
    """Gathers the confusion matrix of a classifier over one phase, and the scores where there is one class per sample.

    Args:
        phase: that is observed.
        output: the model output that may be class scores, (B, C, ...).
        label: the field that may be the classes, (B, ...).
        places: as for `SampleValues`.
    """

    def __init__(self, phase: str, output: str, label: str, places: Callable[[], Sequence[Tensor]]):
        self.phase, self.output, self.label, self.places = phase, output, label, places
        self.matrix: Tensor | None = None
        self._number = self._kept = 0
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._at: list[Tensor] = []

    def hook(self) -> Middleware[Step]:
        """The middleware. It leaves state and logs as they are."""

        def wrap(step: Step) -> Step:
            def scored(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
                after, logs = step(state, batch)
                fields = {**batch, **seal(logs).outputs}
                self._add(batch, fields.get(self.output), fields.get(self.label))
                return after, logs

            return scored

        core = {"outputs": (ALL_OUTPUTS,)}
        return Middleware("class_scores", wrap, "host", phases=(self.phase,), role="observer", core=core)

    def _add(self, batch: Batch, pred: Any, label: Any) -> None:
        place = self.places()[self._number]
        self._number += 1
        if not are_class_scores(pred, label) or pred.shape[1] > _CLASSES:
            return
        real = real_rows(batch, place)
        pred, label = pred.detach()[: len(real)].cpu()[real], label[: len(real)].cpu().long()[real]
        found = confusion_matrix(pred.argmax(1).flatten(), label.flatten(), pred.shape[1])
        self.matrix = found if self.matrix is None else self.matrix + found
        self._kept += pred.numel()
        if pred.dim() == 2 and self._kept <= _SCORES:
            self._scores.append(pred.float())
            self._labels.append(label)
            self._at.append(place[real.nonzero().flatten()])

    def gathered(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of all ranks: the matrix (C, C) int64, scores (N, C) float32 and classes (N,) int64; None where there are none."""
        if dist.any_rank(self.matrix is None, device):
            return None, None, None
        assert self.matrix is not None
        matrix = dist.all_reduce(self.matrix.to(device)).cpu()
        if dist.any_rank(not self._scores or self._kept > _SCORES, device):
            return matrix, None, None
        at = torch.cat(self._at)
        return matrix, in_order(torch.cat(self._scores), at, device), in_order(torch.cat(self._labels), at, device)


def real_rows(batch: Batch, place: Tensor) -> Tensor:
    """Which of the first `len(place)` rows of a batch are samples that count, and no stand-ins for bad ones: (n,) bool."""
    if WEIGHT not in batch:
        return torch.ones(len(place), dtype=torch.bool)
    return batch[WEIGHT][: len(place)].cpu() > 0


def in_order(rows: Tensor, at: Tensor, device: torch.device) -> Tensor:
    """The rows (n, ...) of all ranks, sorted by their places (n,) in the epoch; on the CPU, the same on every rank."""
    places = dist.all_gather(at.to(device)).cpu()
    return dist.all_gather(rows.to(device)).cpu()[torch.argsort(places)]
