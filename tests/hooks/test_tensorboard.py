"""TensorBoard's event files, read back with its own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_metric_hook import OWN_MAPPING, Count, Stop, raising
from tiny import rows_of, tiny_cfg
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.pictures.samples import pictures_of

reader = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard", exc_type=ImportError
)


def events(folder: Path) -> Any:
    found = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    found.Reload()
    return found


def curve(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in found.Scalars(tag)]


def Pictures(n: int = 30, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(n, 1, 6, 6, generator=g), torch.randint(0, 3, (n,), generator=g))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(36, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(input.flatten(1))


def picture_cfg(folder: Path, **tensorboard: Any) -> dict[str, Any]:
    cfg = tiny_cfg(folder, tensorboard=dict(type="TensorboardHook", interval=1, **tensorboard))
    cfg["model"] = dict(type=Flat)
    cfg["data"] |= dict(train=dict(type=Pictures), val=dict(type=Pictures, n=9, seed=1))
    return cfg


def test_every_scalar_of_every_phase_is_under_its_tag(tmp_path: Path) -> None:
    """Running means, results (those of class-style metrics too) and the rate, with the values of the record, at its steps."""
    cfg = tiny_cfg(tmp_path, tensorboard=dict(type="TensorboardHook", interval=1))
    cfg["hooks"]["metrics"]["mine"] = dict(type=Count, mapping=OWN_MAPPING)
    fit(cfg)
    found, rows = events(tmp_path / "tensorboard"), rows_of(tmp_path)
    wanted = {f"train/{n}" for n in ("loss", "top1")} | {"lr/0"}
    wanted |= {f"epoch/{p}/{n}" for p in ("train", "val") for n in ("loss", "top1", "mine_share", "mine_samples")}
    assert set(found.Tags()["scalars"]) == wanted
    assert [s for s, _ in curve(found, "train/loss")] == list(range(1, 16))
    for phase in ("train", "val"):
        for name in ("loss", "top1", "mine_share"):
            expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows if r["final"] and r["phase"] == phase]
            assert curve(found, f"epoch/{phase}/{name}") == expected
    assert curve(found, "lr/0") == [(s, pytest.approx(0.01)) for s in range(1, 16)]


def test_the_cfg_and_the_last_results_are_one_run_of_the_hparams_tab(tmp_path: Path) -> None:
    """In the folder of the scalars, without a run beside it: the parameters by dotted path and the tags of the results."""
    from tensorboard.plugins.hparams import metadata

    fit(tiny_cfg(tmp_path, tensorboard=dict(type="TensorboardHook")))
    assert [p.is_dir() for p in (tmp_path / "tensorboard").rglob("*")] == [False]
    found = events(tmp_path / "tensorboard")
    content = found.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["optimizer.lr"].number_value == 0.01 and start.hparams["optimizer.type"].string_value == "AdamW"
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    tags = {m.name.tag for m in experiment.metric_infos}
    assert tags == {f"epoch/{p}/{n}" for p in ("train", "val") for n in ("loss", "top1")} <= set(found.Tags()["scalars"])
    assert metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status == 1


def test_a_resumed_run_purges_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Each step once, with the values of a run that was never stopped."""

    def cfg(folder: str, **more: Any) -> dict[str, Any]:
        hooks = dict(
            checkpoint=dict(type="CheckpointHook"),
            resume=dict(type="ResumeHook"),
            tensorboard=dict(type="TensorboardHook", interval=1),
        )
        return tiny_cfg(tmp_path / folder, **hooks, **more)

    fit(cfg("whole"))
    with pytest.raises(Stop):
        fit(cfg("cut", raising=dict(type=raising, step=9)))
    fit(cfg("cut"))
    whole, cut = (events(tmp_path / f / "tensorboard") for f in ("whole", "cut"))
    assert whole.Tags()["scalars"] == cut.Tags()["scalars"]
    for tag in whole.Tags()["scalars"]:
        assert curve(cut, tag) == curve(whole, tag), tag


@pytest.mark.parametrize("compiled", [False, True])
def test_histograms_are_of_parameters_and_gradients(compiled: bool, tmp_path: Path, aot_eager: None) -> None:
    """Every n epochs, of each parameter; that of the gradients is of the update that the epoch's last step made."""
    cfg = picture_cfg(tmp_path, histograms=2) | {
        "optimizer": dict(type="SGD", lr=0.1, weight_decay=0.5),
        "compile": compiled,
        "workflow": [{"phase": "train"}],
        "total_epochs": 2,
    }
    before: list[Any] = []
    cfg["hooks"]["before"] = dict(type=lambda: watching(before))
    state = fit(cfg).state
    found = events(tmp_path / "tensorboard")
    assert sorted(found.Tags()["histograms"]) == [f"{k}/last.{n}" for k in ("grads", "params") for n in ("bias", "weight")]
    [params], [grads] = found.Histograms("params/last.weight"), found.Histograms("grads/last.weight")
    assert params.step == grads.step == 6
    old, new = before[-1].detach(), state.params["last.weight"].detach()
    gradient = (old - new) / 0.1 - 0.5 * old  # as SGD moved
    assert params.histogram_value.sum == pytest.approx(float(new.double().sum()), rel=1e-4)
    assert grads.histogram_value.sum_squares == pytest.approx(float(gradient.double().square().sum()), rel=1e-3)


def watching(before: list[Any], *, name: str = "before") -> Any:
    from ailab.stack import Middleware

    def wrap(step: Any) -> Any:
        def watched(state: Any, batch: Any) -> Any:
            before.append(state.params["last.weight"].clone())
            return step(state, batch)

        return watched

    return Middleware(name, wrap, "host")


def test_images_are_of_the_first_evaluation_batch(tmp_path: Path) -> None:
    """One contact sheet per epoch. Training is bitwise that of a run without them."""
    state = fit(picture_cfg(tmp_path / "with", images=4)).state
    plain = fit(picture_cfg(tmp_path / "without")).state
    found = events(tmp_path / "with" / "tensorboard")
    assert found.Tags()["images"] == ["samples/val"]
    sheets = found.Images("samples/val")
    assert [s.step for s in sheets] == [3, 6, 9]
    assert sheets[0].width >= 2 * 96 and sheets[0].height >= 2 * 96
    for name, value in plain.params.items():
        assert torch.equal(value, state.params[name])


def test_a_picture_shows_target_and_prediction() -> None:
    """Classes in words, maps in colours beside the input, pictures beside pictures."""
    x = torch.rand(2, 1, 8, 4)
    scores = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0]])
    a, b = pictures_of({"input": x, "target": torch.tensor([1, 2]), "output": scores})
    assert (a.caption, b.caption) == ("target 1, predicted 1", "target 2, predicted 0")
    assert a.image.shape == (3, 192, 96) and a.image.dtype == torch.uint8
    assert int(a.image.min()) == 0 and int(a.image.max()) == 255
    dense = pictures_of({"input": x, "target": torch.randint(0, 3, (2, 8, 4)), "output": torch.rand(2, 3, 8, 4)})[0]
    assert dense.image.shape == (3, 192, 3 * 96) and dense.caption == ""
    copy = pictures_of({"input": x, "output": x * 100})[0]
    assert torch.equal(copy.image[:, :, :96], copy.image[:, :, 96:])
    numbers = pictures_of({"input": x, "target": torch.tensor([0.5, 1.0]), "output": torch.tensor([[0.25], [1.0]])})[0]
    assert numbers.caption == "target 0.5, predicted 0.25"


def test_the_failures_of_all_its_parts_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scalars, histograms and images that all fail give three warnings. Then nothing is tried again."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for method in ("add_scalar", "add_histogram", "add_image", "close"):
        monkeypatch.setattr(SummaryWriter, method, full)
    fit(picture_cfg(tmp_path, histograms=1, images=1))
    out = capsys.readouterr().out
    assert out.count("warning: hook 'tensorboard' failed: OSError") == 3 and out.count("it is switched off now") == 1


def test_images_of_what_is_no_picture_are_refused(tmp_path: Path) -> None:
    """Before the first step, with the shape that came."""
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.tensorboard\.images: the field 'input' has the shape \(4, 4\)"):
        fit(tiny_cfg(tmp_path / "run", tensorboard=dict(type="TensorboardHook", images=4)))
    with pytest.raises(ConfigError, match="histograms=-1"):
        fit(tiny_cfg(tmp_path / "run", tensorboard=dict(type="TensorboardHook", histograms=-1)))
    assert not (tmp_path / "run").exists()
