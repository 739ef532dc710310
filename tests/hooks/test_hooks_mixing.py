"""Mixup, CutMix and label smoothing against computations by hand, with the shares and partners that were drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOP1, tiny_cfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from ailab.build import loss_of
from ailab.config import check
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.errors import ConfigError
from ailab.hooks import CutMixHook, GradAccumulateHook, LabelSmoothingHook, MixupHook
from ailab.hooks.loss.mixing import draw_lambda, draw_partner
from ailab.job.assemble import assemble
from ailab.stack import stack
from ailab.types import VIEWS, WEIGHT, Aux, Batch, Mean

G = torch.Generator().manual_seed(0)
BATCH: Batch = {"input": torch.randn(8, 3, 6, 5, generator=G), "target": torch.randint(4, (8,), generator=G)}
MASK = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1])
MODEL = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 3, 4))


def seen(hooks: list[Any], batch: Batch, seed: int = 0) -> Batch:
    """The batch that the loss inside these hooks gets."""
    found: list[Batch] = []

    def spy(params: Any, buffers: Any, batch: Batch) -> tuple[Tensor, Aux]:
        found.append(batch)
        return torch.zeros(()), Aux({}, torch.ones(()), {})

    torch.manual_seed(seed)
    stack(spy, hooks)({}, {}, batch)
    return found[0]


def mean_loss(hooks: list[Any], batch: Batch, criterion: Any = None, seed: int = 0) -> tuple[Tensor, Aux]:
    """The loss of MODEL in these hooks, divided by its weight."""
    state = module_state(MODEL, criterion if isinstance(criterion, nn.Module) else None).clone()
    torch.manual_seed(seed)
    total, aux = stack(loss_of(MODEL, criterion or nn.CrossEntropyLoss()), hooks)(state.params, state.buffers, batch)
    return total / aux.weight, aux


def plain_output(x: Tensor) -> Tensor:
    """MODEL in training, on its own."""
    kept = {n: b.clone() for n, b in MODEL.named_buffers()}
    out = MODEL.train()(x)
    MODEL.load_state_dict({**dict(MODEL.named_parameters()), **kept})
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_mixup_is_the_sum_of_two_losses(per: Any, masked: bool) -> None:
    """With the share and partners that were drawn: share * loss(own) + (1 - share) * loss(partner's), padding left out."""
    batch = {**BATCH, WEIGHT: MASK} if masked else BATCH
    ours, aux = mean_loss([MixupHook(alpha=0.7, per=per)], batch, seed=5)
    torch.manual_seed(5)
    share, partner = draw_lambda(0.7, 1.0, 8 if per == "sample" else None, torch.device("cpu")), draw_partner(batch)
    share = torch.maximum(share, 1 - share).expand(8)
    x = torch.stack([s * a + (1 - s) * b for s, a, b in zip(share, BATCH["input"], BATCH["input"][partner], strict=True)])
    out, y = plain_output(x), BATCH["target"]
    each = share * cross_entropy(out, y, reduction="none") + (1 - share) * cross_entropy(out, y[partner], reduction="none")
    weight = MASK if masked else torch.ones(8)
    torch.testing.assert_close(ours, (each * weight).sum() / weight.sum())
    assert float(aux.logs["loss"].weight) == float(weight.sum())
    torch.testing.assert_close(aux.outputs["output"], out.detach())


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("shape", [(8, 3, 12, 10), (8, 30), (8, 2, 6, 5, 4)])
def test_cutmix_pastes_one_box(shape: tuple[int, ...], per: Any) -> None:
    """Each sample is its own but for one box of its partner's, across all channels; the share is what is left, by area."""
    x = torch.arange(float(torch.tensor(shape).prod())).view(shape)  # every value is of one place
    batch = {"input": x, "target": torch.arange(8)}
    boxes = 0
    for seed in range(20):
        got = seen([CutMixHook(per=per)], batch, seed)
        (own, nothing), (rest, theirs) = got[VIEWS]
        partner = theirs["target"]
        assert nothing == {}
        assert not (partner == torch.arange(8)).any()
        for i in range(8):
            pasted = got["input"][i] == x[partner[i]]
            assert (pasted | (got["input"][i] == x[i])).all()
            planes = pasted if len(shape) > 2 else pasted[None]
            assert (planes == planes[:1]).all()
            box = torch.ones_like(planes[0])
            for d in range(planes[0].dim()):
                others = [k for k in range(planes[0].dim()) if k != d]
                line = planes[0].amax(others) if others else planes[0]
                box &= line.view([-1 if k == d else 1 for k in range(planes[0].dim())])
            assert torch.equal(box, planes[0])  # a box is the product of its shadows
            shares = own.expand(8), rest.expand(8)
            assert float(shares[0][i]) == pytest.approx(1 - float(box.float().mean()), abs=1e-6)
            assert float(shares[0][i] + shares[1][i]) == pytest.approx(1.0)
            boxes += bool(box.any())
    assert boxes > 80


def test_partners_are_others_that_count() -> None:
    """Samples that count form one cycle. A padded sample is only its own partner."""
    for seed in range(50):
        torch.manual_seed(seed)
        partner = draw_partner({**BATCH, WEIGHT: MASK})
        counted = MASK.nonzero().flatten()
        assert sorted(partner[counted].tolist()) == counted.tolist()
        assert (partner[counted] != counted).all()
        assert torch.equal(partner[MASK == 0], (MASK == 0).nonzero().flatten())
    none = draw_partner({**BATCH, WEIGHT: torch.zeros(8)})
    assert torch.equal(none, torch.arange(8))
    first = torch.stack([draw_partner(BATCH)[0] for _ in range(700)])
    assert torch.bincount(first, minlength=8)[1:].min() > 60  # each of the seven others, 100 times on average


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 8.0])
def test_shares_are_beta(alpha: float) -> None:
    """The distribution is Beta(alpha, alpha): mean, variance and the mass near 0, also where Gamma variables underflow."""
    torch.manual_seed(0)
    n = 40_000
    share = draw_lambda(alpha, 1.0, n, torch.device("cpu")).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert torch.isfinite(share).all()
    assert abs(float(share.mean()) - 0.5) < 4 * (variance / n) ** 0.5
    assert abs(float(share.var()) - variance) < 0.02 * variance
    other = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double()).sample((n,))
    for quantile in (0.1, 0.25, 0.4):
        ours, theirs = float((share < quantile).double().mean()), float((other < quantile).double().mean())
        assert abs(ours - theirs) < 0.02
    some = draw_lambda(alpha, 0.3, n, torch.device("cpu"))
    assert abs(float((some == 1).double().mean()) - 0.7) < 0.02 + float((share == 1).double().mean())


@pytest.mark.parametrize(
    "hook", [MixupHook(alpha=0), MixupHook(prob=0), CutMixHook(alpha=0), LabelSmoothingHook(4, smoothing=0)]
)
def test_nothing_to_mix_is_the_loss_itself(hook: Any) -> None:
    """With alpha=0, prob=0 or smoothing=0 the hook returns its loss unchanged, as the same object."""
    bare = loss_of(MODEL, nn.CrossEntropyLoss())
    assert hook(bare) is bare


@pytest.mark.parametrize(
    "hooks",
    [
        [MixupHook(), CutMixHook()],
        [CutMixHook(per="sample"), MixupHook(per="sample")],
        [MixupHook(per="sample"), LabelSmoothingHook(4, 0.3)],
        [LabelSmoothingHook(4, 0.3), CutMixHook()],
    ],
)
def test_mixtures_compose(hooks: list[Any]) -> None:
    """Several of them nest: the loss is cross-entropy against the mixture of all targets, whose shares add up to one."""
    ours, _ = mean_loss(hooks, BATCH, seed=3)
    got = seen(hooks, BATCH, seed=3)
    soft = torch.zeros(8, 4)
    for share, fields in got[VIEWS]:
        target = fields.get("target", BATCH["target"])
        soft += share.view(-1, 1) * (target if target.is_floating_point() else one_hot(target, 4))
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    torch.testing.assert_close(ours, cross_entropy(plain_output(got["input"]), soft))


class Scalar(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)


class Weighed:
    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Mean]:
        values = cross_entropy(output, target, reduction="none")
        return {"ce": Mean.of(values, weight), "double": Mean.of(2 * values, weight)}


class Unweighed(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Mean:
        return Mean.of(cross_entropy(output, target, reduction="none"))


@pytest.mark.parametrize("criterion", [Scalar(), Weighed(), Unweighed()])
def test_every_kind_of_criterion_can_be_mixed(criterion: Any) -> None:
    """A scalar, a dict of Means and a Mean that knows no weights are mixed as per-sample values are."""
    expected, _ = mean_loss([MixupHook()], BATCH, seed=9)
    ours, aux = mean_loss([MixupHook()], BATCH, criterion, seed=9)
    torch.testing.assert_close(ours, expected * (3 if isinstance(criterion, Weighed) else 1))
    if isinstance(criterion, Weighed):
        torch.testing.assert_close(aux.logs["ce"].value, expected)
        per_sample, _ = mean_loss([MixupHook(per="sample")], BATCH, seed=9)
        ours, _ = mean_loss([MixupHook(per="sample")], BATCH, criterion, seed=9)
        torch.testing.assert_close(ours, 3 * per_sample)
    else:
        with pytest.raises(ConfigError, match="one number for all of them"):
            mean_loss([MixupHook(per="sample")], BATCH, criterion)


def test_class_weights_and_ignored_targets_are_mixed_by_their_sums() -> None:
    """Of a class-weighted loss totals and weights are mixed, each by the share."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 2.0]), ignore_index=1)
    ours, _ = mean_loss([MixupHook()], BATCH, criterion, seed=2)
    got = seen([MixupHook()], BATCH, seed=2)
    out, total, weight = plain_output(got["input"]), torch.zeros(()), torch.zeros(())
    for share, fields in got[VIEWS]:
        y = fields.get("target", BATCH["target"])
        fresh = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 2.0]), ignore_index=1, reduction="sum")
        total = total + share * fresh(out, y)
        weight = weight + share * torch.tensor([0.1, 0.0, 3.0, 2.0])[y].sum()
    torch.testing.assert_close(ours, total / weight)


def test_regression_targets_and_other_names() -> None:
    """Targets need not be classes, and the fields may have any name; what is not named is left alone."""
    model = nn.Linear(5, 2)
    batch = {"x": torch.randn(6, 5), "y": torch.randn(6, 2), "id": torch.arange(6)}
    loss = loss_of(model, nn.MSELoss(), mapping={"input": "x"}, loss_mapping={"target": "y"})
    state = module_state(model)
    torch.manual_seed(1)
    total, aux = MixupHook(field="x", targets=["y"])(loss)(state.params, state.buffers, batch)
    got = seen([MixupHook(field="x", targets=["y"])], batch, seed=1)
    (own, _), (rest, theirs) = got[VIEWS]
    assert torch.equal(got["id"], batch["id"])
    out = model(got["x"])
    expected = own * (out - batch["y"]).square().mean() + rest * (out - theirs["y"]).square().mean()
    torch.testing.assert_close(total / aux.weight, expected)


@pytest.mark.parametrize("n", [2, 4])
def test_micro_batches_are_mixed_on_their_own(n: int) -> None:
    """Under accumulate each micro-batch draws its share and its partners from itself; the gradient is that of their mean."""
    state = module_state(MODEL).clone()
    mixed = MixupHook()(loss_of(MODEL, nn.CrossEntropyLoss()))
    torch.manual_seed(4)
    grads, aux = GradAccumulateHook(n)(local_grad(mixed))(state, BATCH)
    torch.manual_seed(4)
    parts = [{k: v[i : i + 8 // n] for k, v in BATCH.items()} for i in range(0, 8, 8 // n)]
    each = [local_grad(mixed)(state, part)[0] for part in parts]
    for name, g in grads.items():
        torch.testing.assert_close(g, torch.stack([e[name] for e in each]).mean(0), rtol=1e-5, atol=1e-6)
    assert float(aux.weight) == 8.0
    assert aux.outputs["output"].shape == (8, 4)


@pytest.mark.parametrize("shape", [(8,), (8, 3, 2)])
def test_label_smoothing_equals_torch(shape: tuple[int, ...]) -> None:
    """For classes and for pictures of classes the loss is that of CrossEntropyLoss(label_smoothing=...)."""
    model = nn.Conv2d(3, 4, 1) if len(shape) > 1 else nn.Linear(3, 4)
    x = torch.randn(8, 3, *shape[1:], generator=G)
    y = torch.randint(4, shape, generator=G)
    state = module_state(model)
    loss = LabelSmoothingHook(4, 0.2)(loss_of(model, nn.CrossEntropyLoss()))
    total, aux = loss(state.params, state.buffers, {"input": x, "target": y, WEIGHT: torch.ones(8)})
    torch.testing.assert_close(total / aux.weight, cross_entropy(model(x), y, label_smoothing=0.2))


def test_an_ignored_target_has_no_probabilities() -> None:
    """A target outside the classes has loss 0, and its sample counts."""
    y = BATCH["target"].clone()
    y[3] = -100
    ours, aux = mean_loss([LabelSmoothingHook(4, 0.2)], {**BATCH, "target": y})
    each = cross_entropy(plain_output(BATCH["input"]), y, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(ours, each.sum() / 8)
    assert float(aux.weight) == 8


@pytest.mark.parametrize("hook", ["mixup", "smooth"])
@pytest.mark.parametrize("metric_first", [False, True])
def test_metrics_see_each_sample_with_its_own_target(hook: str, metric_first: bool, tmp_path: Path) -> None:
    """Wherever the metric is listed it is given class indices, and counts every sample once."""
    entry = dict(type="MixupHook") if hook == "mixup" else dict(type="LabelSmoothingHook", classes=3)
    metrics = dict(type="MetricHook", top1=TOP1)
    entries = dict(metrics=metrics, mine=entry) if metric_first else dict(mine=entry, metrics=metrics)
    cfg = {**tiny_cfg(tmp_path), "hooks": entries}
    check.check(cfg)
    job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
    batch = next(iter(job.streams["train"].epoch(0)))
    _, logs = job.steps["train"](job.state, batch)
    assert float(logs["top1"].weight) == 11
    assert float(logs["loss"].weight) == 11


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(type="MixupHook", alpha=-1.0), r"cfg\.hooks\.mine\.alpha is -1\.0"),
        (dict(type="CutMixHook", prob=2.0), r"cfg\.hooks\.mine\.prob is 2\.0"),
        (dict(type="MixupHook", per="pixel"), r"cfg\.hooks\.mine\.per"),
        (dict(type="MixupHook", field="inptu"), r"cfg\.hooks\.mine: there is no field 'inptu'. Did you mean 'input'"),
        (dict(type="CutMixHook", targets=["labels"]), r"there is no field 'labels'"),
        (dict(type="MixupHook", field="target"), r"'target' is of shape \(4,\); there is nothing to mix"),
        (dict(type="LabelSmoothingHook", classes=3, smoothing=1.5), r"cfg\.hooks\.mine\.smoothing is 1\.5"),
        (dict(type="LabelSmoothingHook", classes=1), r"cfg\.hooks\.mine\.classes is 1"),
        (dict(type="LabelSmoothingHook", classes=3, target="label"), r"cfg\.hooks\.mine\.target: there is no field 'label'"),
        (dict(type="LabelSmoothingHook", classes=3, target="input"), r"label smoothing takes class indices"),
    ],
)
def test_mistakes_are_named(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A setting or a field that makes no sense is a ConfigError with its path, before the first step."""
    cfg = {**tiny_cfg(tmp_path, mine=entry)}
    with pytest.raises(ConfigError, match=message):
        check.check(cfg)
        assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)


def test_a_model_that_gives_its_own_loss_cannot_be_mixed() -> None:
    """Without a criterion there is nothing to be asked twice: a ConfigError that says so."""

    class Own(nn.Module):
        def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
            return {"loss": (input.sum() * 0) + target.float().mean()}

    loss = MixupHook()(loss_of(Own(), None))
    with pytest.raises(ConfigError, match="the model gives its own loss"):
        loss({}, {}, BATCH)
