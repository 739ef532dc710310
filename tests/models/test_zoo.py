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
from ailab.models import ResNet, ViT
from ailab.models.attention import DropPath
from ailab.models.positions import rotated
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
    "ViT-Ti/16": (lambda: ViT("Ti"), 5_717_416),
    "ViT-S/16": (lambda: ViT("S"), 22_050_664),
    "ViT-B/16": (lambda: ViT("B"), 86_567_656),
    "ViT-L/16": (lambda: ViT("L"), 304_326_632),
    # Without a head in the paper: 384 weights and a bias of one class are more here.
    "DINOv2 ViT-S/14": (lambda: ViT("S", 518, 14, 1, layer_scale=1e-5), 22_056_192 + 385),
    "DINOv2 ViT-S/14, 4 registers": (lambda: ViT("S", 518, 14, 1, layer_scale=1e-5, registers=4), 22_057_344 + 385),
    "DINOv3 ViT-S/16": (
        lambda: ViT("S", num_classes=1, layer_scale=1e-5, registers=4, pos="rope", qkv_bias=False),
        21_586_944 + 385,
    ),
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


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ResNet(19), "ResNet.depth: 19 is none of 18, 34, 50, 101, 152."),
        (lambda: ResNet(18, stem="5x5"), "ResNet.stem: '5x5' is none of '7x7', '3x3', 'deep'."),
        (lambda: ResNet(18, std=0), "ResNet.std: 0 is not above 0."),
        (lambda: ResNet(18, mean=(1, 2)), "ResNet.mean: 2 values for 3 channels. Give one, or one for each."),
        (lambda: ViT(image_size=8), "ViT.image_size: 8x8 is no multiple of the patch of 16x16 pixels."),
        (lambda: ViT(image_size=(32, 40)), "ViT.image_size: 32x40 is no multiple of the patch of 16x16 pixels."),
        (lambda: ViT(width=100, heads=3), "ViT.width: 100 is not a multiple of heads=3."),
        (lambda: ViT(width=36, heads=6, pos="rope"), "ViT.width: 36 is not a multiple of heads=6 times 4, for rotary"),
        (lambda: ViT(pool="max"), "ViT.pool: 'max' is none of 'token', 'mean', 'map'."),
        (lambda: ViT(patch_dropout=1.0), "ViT.patch_dropout: 1.0 is not in [0, 1)."),
        (lambda: ViT(drop_path=1.5), "ViT.drop_path: 1.5 is not in [0, 1)."),
    ],
)
def test_a_setting_that_cannot_be_is_told_at_build(make: Any, sentence: str) -> None:
    """One sentence: the argument, what came, what would do."""
    with pytest.raises(ConfigError) as told:
        make()
    assert str(told.value).startswith(sentence) and "\n" not in str(told.value)


def test_names_of_torchvision_stay_theirs() -> None:
    """`type="resnet18"` is torchvision's function, `type="ResNet"` is ours."""
    import torchvision

    assert MODELS.get("resnet18") is torchvision.models.resnet18 and MODELS.get("ResNet") is ResNet


def test_drop_path_keeps_whole_samples_and_their_mean() -> None:
    """Each sample is 0 or divided by the share that stays; in evaluation nothing changes."""
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3]) and torch.equal(y[:, 0], y[:, 2])
    assert float((y[:, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)  # 4 standard errors
    assert torch.equal(drop.eval()(x), x)


def test_patch_dropout_leaves_an_exact_number_of_patches_with_their_positions() -> None:
    """Of 16 patches 12 stay, others for each sample, in order; class token and registers always; angles go with them."""
    torch.manual_seed(0)
    model = ViT(image_size=16, patch=4, width=32, depth=1, heads=2, pos="rope", registers=1, patch_dropout=0.25)
    number = torch.arange(18.0)[None, :, None].expand(8, 18, 32)  # each token is its place
    x, angles = model._thinned(number)
    places = x[..., 0].long()
    assert x.shape == (8, 2 + 12, 32) and torch.equal(places[:, :2], torch.tensor([[0, 1]]).expand(8, 2))
    assert (places.diff(dim=1) > 0).all() and len({tuple(row) for row in places.tolist()}) > 1
    assert model.angles is not None and angles is not None
    assert torch.equal(angles[:, 0], model.angles[0, 0][places])


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    """A product of a query and a key depends on how far apart they stand, and on nothing else."""
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rates = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    turned = [rotated(q, p * rates) @ rotated(k, (p + 3) * rates) for p in (0, 1, 7)]
    torch.testing.assert_close(torch.stack(turned), turned[0].expand(3))
    assert abs(float(turned[0] - q @ k)) > 0.1
    torch.testing.assert_close(rotated(q, 5 * rates).norm(), q.norm())
