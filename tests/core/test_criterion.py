"""What a criterion may be, how its parameters are bound, and what its result stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ailab import Mean, Sum
from ailab.build import loss_of
from ailab.core.grad import local_grad
from ailab.core.loss import kind_of, module_state
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.hooks import GradAccumulateHook
from ailab.types import WEIGHT, Batch

MODEL = nn.Linear(4, 3)
STATE = module_state(MODEL)
BATCH: Batch = {
    "input": torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),
    "target": torch.tensor([0, 1, 2, 2, 0, 1]),
}


def value(criterion: Any, batch: Batch = BATCH, **more: Any) -> tuple[float, dict[str, float]]:
    """The loss and the logs."""
    total, aux = loss_of(MODEL, criterion, **more)(STATE.params, STATE.buffers, batch)
    return float((total / aux.weight).detach()), {n: float(m.value) for n, m in aux.logs.items()}


def gradient(criterion: Any, n: int) -> Tensor:
    grads, _ = GradAccumulateHook(n)(local_grad(loss_of(MODEL, criterion)))(STATE, BATCH)
    return grads["weight"]


def right(loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, MODEL.weight)[0]


OUT = MODEL(BATCH["input"]).detach()
CE, L1 = functional.cross_entropy(OUT, BATCH["target"]), OUT.abs().mean()


# Sums


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        lambda output, target: Sum(functional.cross_entropy(output, target, reduction="none")),
        lambda output, target: Sum(functional.cross_entropy(output, target, reduction="sum")),
    ],
    ids=["torch", "per sample", "number"],
)
def test_a_sum_stays_a_sum_in_micro_batches(criterion: Any, n: int) -> None:
    """The gradient is that of the sum over the batch, and the log is that sum, however many micro-batches it is cut into."""
    whole = functional.cross_entropy(MODEL(BATCH["input"]), BATCH["target"], reduction="sum")
    torch.testing.assert_close(gradient(criterion, n), right(whole), rtol=1e-5, atol=1e-6)
    _, aux = GradAccumulateHook(n)(local_grad(loss_of(MODEL, criterion)))(STATE, BATCH)
    torch.testing.assert_close(aux.logs["loss"].value, whole.detach(), rtol=1e-6, atol=1e-6)
    assert float(aux.logs["loss"].weight) == 6.0


def test_a_masked_sum_is_the_sum_of_the_others() -> None:
    """With weights a per-sample sum is that over the samples that count."""
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    few = functional.cross_entropy(OUT[weight > 0], BATCH["target"][weight > 0], reduction="sum")
    found, _ = value(nn.CrossEntropyLoss(reduction="sum"), {**BATCH, WEIGHT: weight})
    assert found == pytest.approx(float(few), rel=1e-6)


# Parts by name


def test_a_part_called_loss_is_the_total() -> None:
    """{"loss": total, ...}: the total is trained, and the other parts are logs, with a gradient of their own or without."""

    def criterion(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        ce, l1 = functional.cross_entropy(output, target), output.abs().mean()
        return {"loss": ce + 0.1 * l1, "ce": ce, "l1": l1.detach()}

    found, logs = value(criterion)
    assert found == pytest.approx(float(CE + 0.1 * L1), rel=1e-6)
    assert logs == pytest.approx({"loss": float(CE + 0.1 * L1), "ce": float(CE), "l1": float(L1)}, rel=1e-6)
    whole = functional.cross_entropy(MODEL(BATCH["input"]), BATCH["target"]) + 0.1 * MODEL(BATCH["input"]).abs().mean()
    torch.testing.assert_close(gradient(criterion, 1), right(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["total", "total_loss"])
def test_a_total_of_another_name_is_refused(name: str) -> None:
    """Parts are added up, so a total beside its parts would count twice."""
    with pytest.raises(ConfigError, match=rf"cfg\.loss: .*'{name}' looks like\n\s+their total\. Call it 'loss'"):
        value(lambda output, target: {name: output.mean(), "a": output.mean()})


def test_a_part_with_a_factor_is_logged_raw_and_weighted() -> None:
    """(factor, value): the loss takes factor * value, the logs hold both."""
    found, logs = value(
        lambda output, target: {"ce": functional.cross_entropy(output, target), "l1": (0.1, output.abs().mean())}
    )
    assert found == pytest.approx(float(CE + 0.1 * L1), rel=1e-6)
    assert logs == pytest.approx(
        {"loss": float(CE + 0.1 * L1), "ce": float(CE), "l1": float(L1), "l1_weighted": 0.1 * float(L1)}, rel=1e-6
    )


@pytest.mark.parametrize(
    ("criterion", "kind"),
    [
        (nn.CrossEntropyLoss(), "mean"),
        (nn.CrossEntropyLoss(reduction="sum"), "sum"),
        (lambda output, target: functional.cross_entropy(output, target), "scalar"),
        (lambda output, target: functional.cross_entropy(output, target, reduction="none"), "mean"),
        (lambda output, target: {"loss": output.mean(1), "a": output.mean()}, "mean"),
        (lambda output, target: {"a": output.mean(1), "b": output.mean()}, "scalar"),
        (lambda output, target: {"a": output.mean(1), "b": Mean(output.sum(), torch.tensor(2.0))}, "scalar"),
    ],
)
def test_the_kind_of_a_loss(criterion: Any, kind: str) -> None:
    """One number, or parts without a common weight, are taken for a mean over samples: "scalar"."""
    assert kind_of(loss_of(MODEL, criterion), STATE.params, STATE.buffers, BATCH) == kind


# How parameters are bound


class Own(nn.Module):
    """torch's usual signature, and no class of torch."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(input, target, reduction="none")


class Subclass(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


@pytest.mark.parametrize(
    "criterion",
    [Own(), Subclass(), functional.cross_entropy, lambda input, target: functional.cross_entropy(input, target)],
    ids=["own", "subclass", "function of torch", "function"],
)
def test_input_is_the_output_of_the_model(criterion: Any) -> None:
    """Any criterion of `input` and `target` is given the model's output, as torch's own are."""
    assert value(criterion)[0] == pytest.approx(float(CE), rel=1e-6)


def test_input_beside_an_output_is_the_batch_field() -> None:
    """A criterion that names an output too gets the batch's `input` (a reconstruction loss)."""
    found, _ = value(lambda output, input: (output.sum(1) - input.sum(1)).square())
    assert found == pytest.approx(float((OUT.sum(1) - BATCH["input"].sum(1)).square().mean()), rel=1e-6)


class WeightedMean(nn.Module):
    def forward(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Mean:
        values = functional.cross_entropy(output, target, reduction="none")
        weight = torch.ones_like(values) if weight is None else weight
        return Mean((values * weight).sum(), weight.sum())


@pytest.mark.parametrize("mapping", [{}, {"weight": "_weight"}], ids=["by name", "by mapping"])
def test_a_module_that_takes_weight_is_given_the_weights(mapping: dict[str, str]) -> None:
    """A criterion that returns a Mean and takes `weight` masks padding; a field "weight" of the batch comes first."""
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    few = functional.cross_entropy(OUT[:3], BATCH["target"][:3])
    assert value(WeightedMean(), {**BATCH, WEIGHT: weight}, loss_mapping=mapping)[0] == pytest.approx(float(few), rel=1e-6)
    if not mapping:
        own = {**BATCH, "weight": 1 - weight}
        last = functional.cross_entropy(OUT[3:], BATCH["target"][3:])
        assert value(WeightedMean(), own)[0] == pytest.approx(float(last), rel=1e-6)


# In a cfg


def smoothed(output: Tensor, target: Tensor, amount: float = 0.0, scale: float = 1.0) -> Tensor:
    return scale * functional.cross_entropy(output, target, label_smoothing=amount, reduction="none")


def factory(amount: float = 0.1) -> Any:
    return lambda output, target: smoothed(output, target, amount)


class OwnLoss(nn.Module):
    """A model that gives its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = self.linear(input)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits}


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (lambda: nn.Linear(4, 3), dict(type=smoothed)),
        (lambda: nn.Linear(4, 3), dict(type=smoothed, scale=1.0)),
        (lambda: nn.Linear(4, 3), dict(type="torch.nn.functional.cross_entropy", reduction="none")),
        (lambda: nn.Linear(4, 3), dict(type=factory, amount=0.0)),
        (OwnLoss, None),
    ],
    ids=["function", "with an argument", "of torch", "a builder", "of the model"],
)
def test_what_can_stand_in_a_cfg(model: Any, loss: Any, tmp_path: Path) -> None:
    """A function is the criterion, where arguments that it needs are left out; else it builds one. A model may give its loss."""
    data = torch.utils.data.TensorDataset(BATCH["input"], BATCH["target"])
    cfg = dict(
        work_dir=str(tmp_path),
        data=dict(train=dict(type=lambda: data), train_dataloader=dict(batch_size=6, shuffle=False)),
        model=dict(type=model),
        loss=loss,
        optimizer=dict(type="SGD", lr=0.0),
    )
    result = fit(cfg)
    plain = OwnLoss().linear if model is OwnLoss else nn.Linear(4, 3)
    plain.load_state_dict({n.removeprefix("linear."): p.detach() for n, p in result.state.params.items()})
    assert result.metrics["train_loss"] == pytest.approx(
        float(functional.cross_entropy(plain(BATCH["input"]), BATCH["target"]).detach()), rel=1e-5
    )
