"""Small components that random cfgs are made of: datasets, models, losses, a metric, and hooks that disturb or record a run."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ailab.stack import Middleware
from ailab.types import WEIGHT, Mean, RunInfo, Sum, TrainState

CLASSES, WORDS, LENGTH = 4, 11, 5
CLASS_WEIGHTS = (1.0, 2.0, 0.5, 1.5)
IGNORED = -100


def samples(kind: str, n: int, seed: int, ignored: float = 0.0, dtype: str = "float32") -> dict[str, Tensor]:
    """`n` samples with their ids; what is no index is of `dtype`. A target is ignored with the probability `ignored`.

    points: (6,) and a class. values: (6,) and (4,) numbers. pictures: (2, 6, 6) and a class. tokens: (5,) and the 5 next words.
    """
    random = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        text = torch.randint(WORDS, (n, LENGTH + 1), generator=random)
        inputs, targets = text[:, :-1].clone(), text[:, 1:].clone()
    else:
        inputs = torch.randn(n, *((2, 6, 6) if kind == "pictures" else (6,)), generator=random)
        targets = torch.randn(n, 4, generator=random) if kind == "values" else torch.randint(CLASSES, (n,), generator=random)
    if ignored:
        targets[torch.rand(targets.shape, generator=random) < ignored] = IGNORED
    fields = {"input": inputs, "target": targets, "id": torch.arange(n)}
    return {name: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for name, v in fields.items()}


class BySample(Dataset[Any]):
    """A dataset that is read by sample."""

    def __init__(self, kind: str, n: int, seed: int, ignored: float = 0.0, dtype: str = "float32"):
        self.fields = samples(kind, n, seed, ignored, dtype)

    def __len__(self) -> int:
        return len(self.fields["id"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.fields.items()}


class InMemory(BySample):
    """The same samples as one tensor for each field."""

    def tensors(self) -> dict[str, Tensor]:
        return self.fields


# Models. Each takes the dtype of its parameters and gives what it computes in it.


class Perceptron(nn.Module):
    """Two layers. With `counting` a buffer counts the training steps."""

    def __init__(self, dropout: float = 0.0, counting: bool = False, dtype: str = "float32"):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 7), nn.Dropout(dropout), nn.Linear(7, 4)
        if counting:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.counting = counting
        self.to(getattr(torch, dtype))

    def forward(self, input: Tensor) -> Tensor:
        if self.counting and self.training:
            self.calls.add_(1)
        return self.last(self.drop(torch.tanh(self.first(input.to(self.first.weight.dtype)))))


class ConvNet(nn.Module):
    """A convolution, BatchNorm where `norm`, max-pooling and a linear layer."""

    def __init__(self, norm: bool = True, channels_last: bool = False, dtype: str = "float32"):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(5 * 9, CLASSES)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)
        self.to(getattr(torch, dtype))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm(self.conv(input.to(self.conv.weight.dtype))).relu()
        return self.head(functional.max_pool2d(hidden, 2).flatten(1))


class Transformer(nn.Module):
    """One layer of causal attention; the output weights are those of the embedding. (B, 5) words to (B, 11, 5) logits."""

    def __init__(self, dropout: float = 0.0, width: int = 8, dtype: str = "float32"):
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, width), nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(dropout)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("past", torch.ones(LENGTH, LENGTH).tril().bool(), persistent=False)
        self.to(getattr(torch, dtype))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.embed(input) + self.place
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~self.past, -math.inf)
        hidden = hidden + self.drop(self.out(scores.softmax(-1) @ value))
        return self.head(hidden).transpose(1, 2)


class TwoHeads(nn.Module):
    """Logits of 4 and of 3 classes, as a tuple or as a dict."""

    def __init__(self, named: bool = False, dropout: float = 0.0, dtype: str = "float32"):
        super().__init__()
        self.body, self.drop = nn.Linear(6, 7), nn.Dropout(dropout)
        self.one, self.two = nn.Linear(7, CLASSES), nn.Linear(7, 3)
        self.named = named
        self.to(getattr(torch, dtype))

    def forward(self, input: Tensor) -> Any:
        hidden = self.drop(functional.gelu(self.body(input.to(self.body.weight.dtype))))
        one, two = self.one(hidden), self.two(hidden)
        return {"output": one, "aux": two} if self.named else (one, two)


# Losses of a user's own, one for each form that a criterion may return.


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, (B,)."""
    values = functional.cross_entropy(output, target, reduction="none")
    return values if values.dim() == 1 else values.mean(1)


def size(output: Tensor) -> Tensor:
    """The mean square of each sample's logits, (B,)."""
    return output.square().flatten(1).mean(1)


def scalar(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target)


def absolute(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean(1)


def summed(output: Tensor, target: Tensor) -> Sum:
    return Sum(per_sample(output, target))


def summed_scalar(output: Tensor, target: Tensor) -> Sum:
    return Sum(per_sample(output, target).sum())


def parts(output: Tensor, target: Tensor) -> dict[str, Any]:
    return {"ce": per_sample(output, target), "size": (0.01, size(output))}


def scalar_parts(output: Tensor, target: Tensor) -> dict[str, Any]:
    return {"ce": scalar(output, target), "size": 0.01 * output.square().mean()}


def total_and_logs(output: Tensor, target: Tensor) -> dict[str, Any]:
    ce, large = per_sample(output, target), size(output)
    return {"loss": ce + 0.01 * large, "ce": ce, "size": large}


def two_parts(output: Tensor, aux: Tensor, target: Tensor) -> dict[str, Any]:
    return {"one": per_sample(output, target), "two": (0.3, per_sample(aux, target % 3))}


def two_scalar(output: Tensor, aux: Tensor, target: Tensor) -> Tensor:
    return scalar(output, target) + 0.3 * scalar(aux, target % 3)


class WeightedClasses(nn.Module):
    """A `Mean`: cross-entropy by class weight, which a buffer holds."""

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__()
        self.register_buffer("classes", torch.tensor(CLASS_WEIGHTS, dtype=getattr(torch, dtype)))

    def forward(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Mean:
        counts = self.classes[target] if weight is None else self.classes[target] * weight
        return Mean((per_sample(output, target) * counts).sum(), counts.sum())


class Tempered(nn.Module):
    """Cross-entropy of logits that are multiplied by a parameter of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(output * self.factor, target)


class Norm:
    """A pure metric: the norm of a sample's logits."""

    def __call__(self, pred: Tensor, weight: Tensor | None = None) -> Mean:
        return Mean.of(pred.detach().float().flatten(1).norm(dim=1), weight)


# Hooks that disturb a run.


def NaNGradient(at: int) -> Middleware[Any]:
    """Makes the gradient of the step after `at` NaN."""

    def wrap(grad: Any) -> Any:
        def spoilt(state: TrainState, batch: Any) -> Any:
            grads, aux = grad(state, batch)
            factor = torch.where(state.step == at, math.nan, 1.0)
            return {n: g * factor.to(g.dtype) for n, g in grads.items()}, aux

        return spoilt

    return Middleware("nan_gradient", wrap, "grad")


def LossJump(at: int) -> Middleware[Any]:
    """Logs 50 times the loss in the step after `at`."""

    def wrap(grad: Any) -> Any:
        def jumped(state: TrainState, batch: Any) -> Any:
            grads, aux = grad(state, batch)
            loss: Mean = aux.logs["loss"]
            total = loss.total * torch.where(state.step == at, 50.0, 1.0).to(loss.total.dtype)
            return grads, replace(aux, logs={**aux.logs, "loss": Mean(total, loss.weight)})

        return jumped

    return Middleware("loss_jump", wrap, "grad")


class Stopped(Exception):
    """What `StopOnce` raises."""


def StopOnce(at: int, how: str, *, run: RunInfo) -> Middleware[Any]:
    """Stops the run after step `at`, by an exception or by SIGTERM; not where its mark is in the `work_dir` already."""
    mark = run.work_dir / "stopped"

    def wrap(step: Any) -> Any:
        def stopping(state: TrainState, batch: Any) -> Any:
            state, logs = step(state, batch)
            if state.at == at and not mark.exists():
                mark.touch()
                if how == "raise":
                    raise Stopped
                os.kill(os.getpid(), signal.SIGTERM)
            return state, logs

        return stopping

    return Middleware("stop_once", wrap, "host")


@dataclass
class Recording:
    """The first state of a run, and the ids of the samples that counted in each of its training steps."""

    first: TrainState | None = None
    ids: list[list[int]] = field(default_factory=list[list[int]])

    def hook(self) -> list[Middleware[Any]]:
        """The hook that records; as `dict(type=recording.hook)` in a cfg."""

        def wrap_run(run: Any) -> Any:
            def recorded(state: TrainState) -> TrainState:
                self.first = state.clone()
                return run(state)

            return recorded

        def wrap(step: Any) -> Any:
            def recorded(state: TrainState, batch: Mapping[str, Any]) -> Any:
                counted = batch["id"][batch[WEIGHT] > 0] if WEIGHT in batch else batch["id"]
                self.ids.append(counted.tolist())
                return step(state, batch)

            return recorded

        return [Middleware("recorded_run", wrap_run, "run"), Middleware("recorded", wrap, "host")]
