"""A step that is compiled in parts: any number of batch shapes, and what is no tensor passes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Points
from torch import Tensor, nn
from torch.utils.data import Dataset

from ailab.config import check
from ailab.errors import ConfigError
from ailab.job.assemble import assemble

CUTS = ("step", "grad", "loss")


def trained(work_dir: Path, compiled: Any, say: Callable[[str], None] = lambda line: None, **parts: Any) -> tuple[Any, Any]:
    """The last state of one epoch of training, and the logs of its last step."""
    cfg = dict(
        work_dir=str(work_dir),
        total_epochs=1,
        workflow=[{"phase": "train"}],
        loss=dict(type="CrossEntropyLoss"),
        compile=compiled,
        **{"hooks": {}, "optimizer": dict(type="SGD", lr=0.1), **parts},
    )
    check.check(cfg)
    job = assemble(check.complete(cfg), torch.device("cpu"), say=say)
    state, logs = job.state, None
    for batch in job.streams["train"].epoch(0):
        state, logs = job.steps["train"](state, batch)
    return state, logs


class Growing(Dataset[Any]):
    """Every sample is longer than the one before, and has a name."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(index)
        return {"input": torch.randn(3 + index, 4, generator=g), "target": torch.tensor(index % 3), "name": f"sample {index}"}


class Pooled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).mean(1)


class Plain(torch.optim.SGD):
    """A class of one's own: its update is not compiled, which takes half the time of these tests."""


@pytest.mark.parametrize("cut", ["grad", "loss"])
def test_every_shape_of_a_batch_has_a_graph(cut: str, tmp_path: Path, aot_eager: None) -> None:
    """10 shapes give the parameters of eager steps (1e-6), and each further graph is a line that says its shape."""
    parts = dict(
        data=dict(train=dict(type=Growing), train_dataloader=dict(batch_size=1, shuffle=False)),
        model=dict(type=Pooled),
        optimizer=dict(type=Plain, lr=0.1),
    )
    lines: list[str] = []
    found, _ = trained(tmp_path, dict(cut=cut), lines.append, **parts)
    right, _ = trained(tmp_path, False, **parts)
    torch.testing.assert_close(found.params["weight"], right.params["weight"], rtol=1e-6, atol=1e-6)
    name = {"grad": "train gradient", "loss": "train loss"}[cut]
    told = [line for line in lines if line.startswith(f"{name}: compiled graph")]
    assert len(told) == 9
    assert "(1, 12, 4)" in told[-1]


class Named(Growing):
    """Samples of one shape; each has a name."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return {**sample, "input": sample["input"][:3]}


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_no_tensor_makes_no_graph(cut: str, tmp_path: Path, aot_eager: None) -> None:
    """Batches of one shape that differ in a field of text are run by one graph, at any cut."""
    data = dict(train=dict(type=Named), train_dataloader=dict(batch_size=1, shuffle=False))
    lines: list[str] = []
    trained(tmp_path, dict(cut=cut), lines.append, data=data, model=dict(type=Pooled))
    assert not [line for line in lines if "compiled graph" in line]


# Outputs of the model.


class Cache:
    """An object that the compiler knows nothing of."""

    def __init__(self, keys: Tensor):
        self.keys = [keys]


@dataclass
class Keys:
    keys: Tensor
    count: int


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda h: None,
    "number": lambda h: 3,
    "nest": lambda h: (h, [h, None], "text"),
    "dataclass": lambda h: Keys(h, 2),
    "object": Cache,
}


class Caching(nn.Linear):
    def __init__(self, kind: str) -> None:
        super().__init__(4, 3)
        self.kind = kind

    def forward(self, input: Tensor) -> dict[str, Any]:
        output = super().forward(input)
        return {"output": output, "cache": OUTPUTS[self.kind](output)}


class Count:
    """A metric that is given the cache."""

    def reset(self) -> None:
        self.seen: list[type] = []

    def __init__(self) -> None:
        self.reset()

    def update(self, pred: Any) -> None:
        self.seen.append(type(pred))

    def compute(self) -> float:
        return float(len(self.seen))


READ = dict(m=dict(type="MetricHook", count=dict(type=Count, mapping={"pred": "cache"}, phases=["train"])))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_is_no_tensor_passes_by(kind: str, cut: str, tmp_path: Path, aot_eager: None) -> None:
    """A None, a number, a nest or an object among the outputs changes nothing; a host hook is given it as in an eager run.

    An object that a hook reads cannot come out of a graph that holds the backward. There the error says what works.
    """
    parts = dict(
        data=dict(train=dict(type=Points, n=20), train_dataloader=dict(batch_size=10)), model=dict(type=Caching, kind=kind)
    )
    right, read = trained(tmp_path, False, **parts, hooks=READ)
    state, _ = trained(tmp_path, dict(cut=cut), **parts)
    torch.testing.assert_close(state.params["weight"], right.params["weight"], rtol=1e-6, atol=1e-6)
    if kind == "object" and cut != "loss":
        with pytest.raises(ConfigError, match=r"(?s)cannot be traced as one graph.*compile=dict\(cut='loss'\)"):
            trained(tmp_path, dict(cut=cut), **parts, hooks=READ)
        return
    state, logs = trained(tmp_path, dict(cut=cut), **parts, hooks=READ)
    torch.testing.assert_close(state.params["weight"], right.params["weight"], rtol=1e-6, atol=1e-6)
    assert type(logs.outputs["cache"]) is type(read.outputs["cache"])


def test_outputs_in_a_nest_hold_no_graph(tmp_path: Path) -> None:
    """Tensors in nested outputs come out detached, as those at the top do: a step keeps no graph of the forward alive."""
    parts = dict(
        data=dict(train=dict(type=Points, n=20), train_dataloader=dict(batch_size=10)), model=dict(type=Caching, kind="nest")
    )
    _, logs = trained(tmp_path, False, **parts, hooks=READ)
    h, (same, _), text = logs.outputs["cache"]
    assert not h.requires_grad
    assert not same.requires_grad
    assert text == "text"
