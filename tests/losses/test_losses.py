"""torch's losses asked for per-sample values: the same mean and the same gradient as the module's own."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab.losses import maskable
from ailab.types import Mean

B = 6


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def labels(*shape: int, classes: int = 5) -> Tensor:
    return torch.randint(0, classes, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).double() * 2 - 1


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


def case(cls: type[nn.Module], settings: dict[str, Any], *inputs: Tensor) -> Any:
    named = ",".join(f"{k}={v if isinstance(v, (int, float, str)) else '...'}" for k, v in settings.items())
    shape = "x".join(map(str, inputs[0].shape))
    return pytest.param(cls, settings, inputs, id=f"{cls.__name__}({named})-{shape}")


def cases() -> list[Any]:
    torch.manual_seed(0)
    x, y, pixels = randn(B, 5), randn(B, 5), randn(B, 5, 4, 3)
    weight, pos = torch.rand(5, dtype=torch.float64) + 0.5, torch.rand(5, dtype=torch.float64) + 0.5
    holes = labels(B, 4, 3).index_fill(1, torch.tensor([0]), 3)
    found = [case(cls, {}, x, y) for cls in (nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss)]
    found += [case(nn.MSELoss, {}, randn(B), randn(B)), case(nn.HuberLoss, {"delta": 0.3}, pixels, randn(B, 5, 4, 3))]
    found += [
        case(nn.CrossEntropyLoss, settings, logits, target)
        for logits, target in ((x, labels(B)), (pixels, holes))
        for settings in (
            {},
            {"label_smoothing": 0.1},
            {"weight": weight},
            {"ignore_index": 3},
            {"weight": weight, "ignore_index": 3, "label_smoothing": 0.2},
        )
    ]
    found += [case(nn.CrossEntropyLoss, s, x, y.softmax(1)) for s in ({}, {"weight": weight, "label_smoothing": 0.1})]
    found += [case(nn.CrossEntropyLoss, {"weight": weight}, pixels, randn(B, 5, 4, 3).softmax(1))]
    found += [case(nn.NLLLoss, s, x.log_softmax(1), labels(B)) for s in ({}, {"weight": weight}, {"ignore_index": 2})]
    found += [case(nn.NLLLoss, {"weight": weight}, pixels.log_softmax(1), holes)]
    found += [case(nn.BCELoss, s, x.sigmoid(), y.sigmoid()) for s in ({}, {"weight": weight})]
    found += [case(nn.BCEWithLogitsLoss, s, x, y.sigmoid()) for s in ({}, {"weight": weight, "pos_weight": pos})]
    found += [case(nn.KLDivLoss, s, x.log_softmax(1), y.softmax(1)) for s in ({}, {"reduction": "batchmean"})]
    found += [case(nn.KLDivLoss, {"reduction": "batchmean", "log_target": True}, x.log_softmax(1), y.log_softmax(1))]
    found += [case(nn.PoissonNLLLoss, s, x.abs(), y.abs()) for s in ({}, {"log_input": False, "full": True})]
    found += [case(nn.GaussianNLLLoss, s, x, y, randn(B, v).abs() + 0.1) for s in ({}, {"full": True}) for v in (5, 1)]
    found += [case(nn.HingeEmbeddingLoss, {"margin": 0.7}, x, signs(B, 5)), case(nn.SoftMarginLoss, {}, x, signs(B, 5))]
    found += [case(nn.CosineEmbeddingLoss, {"margin": 0.1}, x, y, signs(B))]
    found += [case(nn.MarginRankingLoss, {"margin": 0.2}, randn(B), randn(B), signs(B))]
    found += [case(nn.MultiLabelMarginLoss, {}, x, torch.tensor([[1, 3, -1, 0, 2]] * B))]
    found += [case(nn.MultiLabelSoftMarginLoss, s, x, (y > 0).double()) for s in ({}, {"weight": weight})]
    found += [case(nn.MultiMarginLoss, s, x, labels(B)) for s in ({}, {"weight": weight, "p": 2})]
    found += [case(nn.TripletMarginLoss, s, x, y, randn(B, 5)) for s in ({}, {"swap": True, "p": 1.0})]
    found += [case(nn.TripletMarginWithDistanceLoss, {"distance_function": distance}, x, y, randn(B, 5))]
    return found


CASES = cases()
NONE = {  # settings and why no per-sample form is offered
    "CTCLoss": {},  # the batch is dimension 1, and each sample is divided by its target's length
    "AdaptiveLogSoftmaxWithLoss": {"in_features": 5, "n_classes": 9, "cutoffs": [4]},  # returns a pair
    "LinearCrossEntropyLoss": {"in_features": 5, "num_classes": 9},  # a linear layer and a loss in one, of newer torch
}
DEPRECATED = {"NLLLoss2d"}  # an alias of NLLLoss that warns


def value(returned: Tensor | Mean, weight: Tensor | None = None) -> Tensor:
    return returned.value if isinstance(returned, Mean) else Mean.of(returned, weight).value


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # torch's advice about KLDivLoss
@pytest.mark.parametrize(("cls", "settings", "inputs"), CASES)
def test_the_per_sample_form_has_the_value_and_gradient_of_the_module(cls: Any, settings: Any, inputs: Any) -> None:
    """The mean of what the maskable form returns equals the module's own mean, and so do the gradients."""
    module = cls(**settings)
    form = maskable(copy.deepcopy(module))
    assert form is not None
    ours, theirs = (inputs[0].clone().requires_grad_() for _ in range(2))
    mine, own = value(form(ours, *inputs[1:])), module(theirs, *inputs[1:])
    torch.testing.assert_close(mine, own, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*torch.autograd.grad(mine, ours), *torch.autograd.grad(own, theirs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("cls", "settings", "inputs"), CASES)
def test_a_sample_of_weight_zero_does_not_count(cls: Any, settings: Any, inputs: Any) -> None:
    """Weight 0 for the last samples gives the value of the batch without them; a `Mean` obeys its `weight` keyword."""
    form = maskable(cls(**settings))
    assert form is not None
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    masked = value(form(*inputs, weight=weight), weight)
    torch.testing.assert_close(masked, value(form(*(t[:4] for t in inputs))), rtol=1e-6, atol=1e-9)


def test_every_loss_of_torch_is_in_the_table() -> None:
    """Each class of torch.nn whose name ends in Loss is either proven above or refused with None."""
    names = {n for n, c in vars(nn).items() if n.endswith("Loss") and inspect.isclass(c)} - DEPRECATED
    proven = {c.values[0].__name__ for c in CASES}
    assert names - proven <= set(NONE)
    for name in names - proven:
        assert maskable(getattr(nn, name)(**NONE[name])) is None


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_another_reduction_is_not_changed(reduction: str) -> None:
    """A sum over the batch is no mean: the criterion stays as the user made it."""
    for cls in (nn.MSELoss, nn.CrossEntropyLoss, nn.KLDivLoss):
        criterion = cls(reduction=reduction)
        assert maskable(criterion) is None
        assert criterion.reduction == reduction


def test_a_subclass_with_its_own_forward_is_not_taken_for_torchs() -> None:
    """Only the mathematics of torch itself is known; a class that overrides forward gets None."""

    class Doubled(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(input, target)

    assert maskable(Doubled()) is None


def test_the_form_has_the_parameter_names_of_forward() -> None:
    """Mappings of a cfg go by parameter name: those of forward, and the keyword `weight`."""
    form = maskable(nn.GaussianNLLLoss())
    assert form is not None
    assert list(inspect.signature(form).parameters) == ["input", "target", "var", "weight"]


def test_class_weights_are_read_at_call_time_and_trace() -> None:
    """Buffers swapped in by functional_call take effect, inside one graph of torch.compile too."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))
            self.form = maskable(self.criterion)

        def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            assert self.form is not None
            mean = self.form(x, y, weight=weight)
            assert isinstance(mean, Mean)
            return mean.total, mean.weight

    torch.manual_seed(0)
    x, y, weight, mask = torch.randn(B, 5), labels(B), torch.rand(5), torch.ones(B)
    holder = Holder()

    def loss(buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        total, count = torch.func.functional_call(holder, buffers, (x, y, mask))
        return total / count

    expected = nn.CrossEntropyLoss(weight=weight)(x, y)
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(run({"criterion.weight": weight}, x), expected)
