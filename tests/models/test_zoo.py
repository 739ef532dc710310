"""The laws of every model, by one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.zoo import CASES, Case
from torch import Tensor, nn
from torch.utils.data import Dataset

from ailab.binding import bind
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.models import ResNet
from ailab.registry import MODELS


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


COUNTS: dict[str, tuple[Any, int]] = {
    "ResNet-18": (lambda: ResNet(18), 11_689_512),
    "ResNet-34": (lambda: ResNet(34), 21_797_672),
    "ResNet-50": (lambda: ResNet(50), 25_557_032),
    "ResNet-101": (lambda: ResNet(101), 44_549_160),
    "ResNet-152": (lambda: ResNet(152), 60_192_808),
    "ResNet-18-D": (lambda: ResNet(18, stem="deep", shortcut="avg"), 11_708_744),
    "ResNet-50-D": (lambda: ResNet(50, stem="deep", shortcut="avg"), 25_576_264),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_the_parameters_that_are_published(name: str) -> None:
    """Exact counts."""
    build, wanted = COUNTS[name]
    with torch.device("meta"):
        assert count(build()) == wanted


def test_the_table_has_every_model() -> None:
    """A new model has to be in the table."""
    assert {case.cfg["type"].__name__ for case in CASES.values()} == set(MODELS.own())


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.nightly if c.nightly else ()) for n, c in CASES.items()])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def arguments(case: Case, model: nn.Module) -> dict[str, Any]:
    return bind(model, case.cfg.get("mapping", {}), "cfg.model").kwargs(case.fields())


def tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def test_a_model_is_one_graph(case: Case, aot_eager: None) -> None:
    """`torch.compile(fullgraph=True)` takes it in both modes; in evaluation the outputs are those of eager mode."""
    model = case.build()
    given = arguments(case, model)
    compiled = torch.compile(model, fullgraph=True)
    assert all(t.isfinite().all() for t in tensors(compiled(**given)) if t.is_floating_point())
    model.eval()
    torch.manual_seed(1)
    wanted = tensors(model(**given))
    torch.manual_seed(1)
    for ours, theirs in zip(tensors(compiled(**given)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_state_dict_comes_back(case: Case) -> None:
    """Another instance with the state_dict gives the same outputs."""
    first, second = case.build(), case.build()
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(1.1).add_(0.01)
    second.load_state_dict(first.state_dict())
    results = []
    for model in (first.eval(), second.eval()):
        torch.manual_seed(1)
        results.append(tensors(model(**arguments(case, model))))
    assert results[0] and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit_is_told(case: Case) -> None:
    """Fields of another shape or range give one sentence: what came, and what would do."""
    for fields, sentence in case.wrong:
        model = case.build()
        with pytest.raises(ConfigError) as told:
            model(**bind(model, case.cfg.get("mapping", {}), "cfg.model").kwargs(fields))
        assert sentence in str(told.value) and len(str(told.value).splitlines()) <= 2


class Rows(Dataset[Any]):
    """The batch of a case, sample by sample, some times over."""

    def __init__(self, case: Case, times: int = 1):
        self.fields, self.times = case.fields(), times

    def __len__(self) -> int:
        return self.times * len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {n: t[index % len(t)] for n, t in self.fields.items()}


def run_cfg(case: Case, work_dir: Path, epochs: int, steps: int, **hooks: Any) -> dict[str, Any]:
    """Epochs of so many steps on one batch."""
    size = len(Rows(case))
    return dict(
        seed=0,
        work_dir=str(work_dir),
        workflow=[{"phase": "train"}, {"phase": "val"}],
        total_epochs=epochs,
        data=dict(
            train=dict(type=Rows, case=case, times=steps),
            val=dict(type=Rows, case=case),
            train_dataloader=dict(batch_size=size, shuffle=False),
            val_dataloader=dict(batch_size=size),
        ),
        model=case.cfg,
        loss=case.loss,
        optimizer=dict(type="AdamW", lr=case.lr),
        hooks=hooks,
        compile=False,
    )


def test_a_run_learns_a_batch_by_heart(case: Case, tmp_path: Path) -> None:
    """A run of ailab, with its own checks of the model, brings the loss of one batch close to nothing."""
    result = fit(run_cfg(case, tmp_path / "run", 2, case.steps // 2))
    assert result.metrics["train_loss"] < case.below


def test_a_run_in_bf16_with_accumulation_and_ema(case: Case, tmp_path: Path) -> None:
    """Autocast to bfloat16, two micro-batches a step and averaged weights: finite, and about the loss of float32."""
    plain = fit(run_cfg(case, tmp_path / "plain", 1, 1)).metrics
    hooks = dict(
        amp=dict(type="AMPHook", dtype="bf16"),
        accumulate=dict(type="GradAccumulateHook", n=2),
        ema=dict(type="EMAHook", decay=0.9),
    )
    halves = fit(run_cfg(case, tmp_path / "halves", 1, 1, **hooks)).metrics
    assert halves["train_loss"] == pytest.approx(plain["train_loss"], rel=0.2)
    assert torch.isfinite(torch.tensor(halves["val_loss"]))
