"""float64 data: kept for a model with float64 parameters, and read as float32 for any other, which is said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ailab.config import check
from ailab.job.assemble import assemble


def numbers() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=g, dtype=torch.float64), torch.randn(8, 2, generator=g, dtype=torch.float64)


def Stacked() -> Dataset[Any]:
    return TensorDataset(*numbers())


class BySample(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = numbers()
        return {"input": x[index].numpy(), "target": y[index].numpy()}


class Net(nn.Linear):
    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(0)
        super().__init__(4, 2, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        assert input.dtype == self.weight.dtype
        return super().forward(input)


@pytest.mark.parametrize("data", [Stacked, BySample])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_parameters_decide(dtype: torch.dtype, data: Any, tmp_path: Path) -> None:
    """One step on float64 data gives plain torch's parameters in the dtype of the model; a change of dtype is one line."""
    lines: list[str] = []
    cfg = dict(
        work_dir=str(tmp_path),
        workflow=[{"phase": "train"}],
        total_epochs=1,
        data=dict(train=dict(type=data), train_dataloader=dict(batch_size=8, shuffle=False)),
        model=dict(type=Net, dtype=dtype),
        loss=dict(type="MSELoss"),
        optimizer=dict(type="SGD", lr=0.1),
        compile=False,
    )
    made = assemble(check.complete(cfg), torch.device("cpu"), say=lines.append)
    batch = next(iter(made.streams["train"].epoch(0)))
    assert {n: v.dtype for n, v in batch.items() if n in ("input", "target")} == {"input": dtype, "target": dtype}
    state, _ = made.steps["train"](made.state, batch)
    plain, (x, y) = Net(dtype), (t.to(dtype) for t in numbers())
    nn.functional.mse_loss(plain(x), y).backward()
    for n, p in plain.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(
            state.params[n], (p - 0.1 * p.grad).detach(), rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0
        )
    said = ["data: input, target: float64 in the data set, read as float32, for no parameter is float64."]
    assert [line for line in lines if "float64" in line] == (said if dtype == torch.float32 else [])
