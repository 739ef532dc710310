"""Class-style metrics in a run: what they may return, what happens when they fail, and what a resumed run knows."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOP1, epochs_of, newest_state, rows_of, tiny_cfg
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError, Preempted
from ailab.fit import fit
from ailab.metrics import LabBaseMetric
from ailab.stack import Middleware
from ailab.types import Mean

torchmetrics = pytest.importorskip("torchmetrics", reason="the oracle")
MAPPING = {"preds": "output", "target": "target"}
OWN_MAPPING = {"pred": "output", "label": "target"}


class Count(LabBaseMetric):
    """Counts of correct samples and of samples, as plain numbers."""

    higher_is_better = {"share": True}  # noqa: RUF012

    def reset(self) -> None:
        self.right, self.samples = 0, 0.0

    def update(self, pred: Tensor, label: Tensor) -> None:
        self.right += int((pred.argmax(1) == label).sum())
        self.samples += len(label)

    def compute(self) -> Any:
        return {"share": self.right / self.samples, "samples": torch.tensor(self.samples)}


class Hoarder(Count):
    """Keeps its samples in a list, so its memory has no fixed shape."""

    def reset(self) -> None:
        super().reset()
        self.shown: list[Tensor] = []

    def update(self, pred: Tensor, label: Tensor) -> None:
        super().update(pred, label)
        self.shown.append(label)


class Opaque(Count):
    """Gathers an object that no checkpoint can hold."""

    def reset(self) -> None:
        super().reset()
        self.shown = {1, 2}


class Fails(Count):
    """Works on the first samples, and fails in `where` when it has been updated often enough."""

    def __init__(self, where: str, after: int = 1):
        self.where, self.after, self.calls = where, after, 0

    def _step(self, here: str) -> None:
        if here == self.where:
            self.calls += 1
            if self.calls > self.after:
                raise ZeroDivisionError("no such luck")

    def update(self, pred: Tensor, label: Tensor) -> None:
        self._step("update")
        super().update(pred, label)

    def compute(self) -> Any:
        self._step("compute")
        return super().compute()


def Curve() -> Any:
    return torchmetrics.classification.MulticlassAccuracy(num_classes=3, average=None)


def Collection() -> Any:
    c = torchmetrics.classification
    return torchmetrics.MetricCollection(
        {
            "acc": c.MulticlassAccuracy(3, average="micro"),
            "matrix": c.MulticlassConfusionMatrix(3),
            "f1": c.MulticlassF1Score(3),
        }
    )


def metric_cfg(folder: Path, entry: dict[str, Any], **hooks: Any) -> dict[str, Any]:
    cfg = tiny_cfg(folder, **hooks)
    cfg["hooks"]["metrics"]["mine"] = entry
    return cfg


def test_torchmetrics_and_the_traced_metric_agree(tmp_path: Path) -> None:
    """In both phases of each epoch, short batches included; the result is in the record under its own name."""
    entry = dict(type="torchmetrics.classification.MulticlassAccuracy", num_classes=3, average="micro", mapping=MAPPING)
    fit(metric_cfg(tmp_path, entry))
    rows = [r for r in rows_of(tmp_path) if r["final"]]
    assert [r["mine"] for r in rows] == pytest.approx([r["top1"] for r in rows])
    assert len(rows) == 6


def test_each_number_of_a_dict_is_one_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a LabBaseMetric and a torchmetrics collection. A value that is not a number is reported once and left out."""
    cfg = metric_cfg(tmp_path, dict(type=Count, mapping=OWN_MAPPING))
    cfg["hooks"]["metrics"]["many"] = dict(type=Collection, mapping=MAPPING, phases=["val"])
    fit(cfg)
    rows = [r for r in rows_of(tmp_path) if r["final"]]
    assert [r["mine_samples"] for r in rows] == [50.0, 20.0] * 3
    assert [r["mine_share"] for r in rows] == pytest.approx([r["top1"] for r in rows])
    assert [r["many_acc"] for r in rows[1::2]] == pytest.approx([r["top1"] for r in rows[1::2]])
    assert "many_f1" in rows[1] and "many_matrix" not in rows[1] and "many_acc" not in rows[0]
    assert (
        capsys.readouterr().out.count("cfg.hooks.metrics.many: not reported, because they are not single numbers: many_matrix")
        == 1
    )


def test_results_of_class_style_metrics_can_be_read_by_name(tmp_path: Path) -> None:
    """By log items, by keep.metric and by an early stop; a misspelt one is an error with the nearest name."""
    items = {"share": "metric_results.val_mine_share", "now": "meters['mine_share'].avg"}
    hooks = dict(
        logger=dict(type="LoggerHook", log_items=items),
        checkpoint=dict(type="CheckpointHook", keep=dict(last=2, best=1, metric="val_mine_share")),
        stop=dict(type="EarlyStopHook", metric="val_mine_share", patience=1, min_delta=1.0),
    )
    fit(metric_cfg(tmp_path / "run", dict(type=Count, mapping=OWN_MAPPING), **hooks))
    rows = [r for r in rows_of(tmp_path / "run") if r["final"]]
    lines = epochs_of(tmp_path / "run" / "train.log")
    assert len(rows) == 4  # stopped after the second epoch: no metric improves by 1 twice
    assert f"share {rows[1]['mine_share']:.4f}" in lines[1] and f"now {rows[1]['mine_share']:.4f}" in lines[1]
    assert f"share {rows[1]['mine_share']:.4f}" in lines[2] and f"now {rows[2]['mine_share']:.4f}" in lines[2]
    for hook, key in (("logger", "log_items"), ("stop", "metric")):
        bad = metric_cfg(tmp_path / "bad", dict(type=Count, mapping=OWN_MAPPING), **hooks)
        wrong = "val_mine_shar" if key == "metric" else {"share": "metric_results.val_mine_shar"}
        bad["hooks"][hook] = {**bad["hooks"][hook], key: wrong}
        with pytest.raises(ConfigError, match=rf"cfg\.hooks\.{hook}\.{key}.*val_mine_shar'.*Did you mean '.*val_mine_share'"):
            fit(bad)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(type=Fails, where="compute", after=0), r"Fails failed on the first samples: ZeroDivisionError: no such luck"),
        (dict(type=Fails, where="update", after=0), r"Fails failed on the first samples: ZeroDivisionError: no such luck"),
        (dict(type=Curve, mapping=MAPPING), r"returned a tensor of shape \(3,\); a result is a number"),
    ],
)
def test_a_metric_that_fails_is_found_before_the_run(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    """On the first few samples: where it raises, and where its result is a vector. Nothing is written."""
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.metrics\.mine: .*" + message) as caught:
        fit(metric_cfg(tmp_path / "run", {"mapping": OWN_MAPPING, **entry}))
    assert len(str(caught.value).splitlines()) <= 4 and not (tmp_path / "run").exists()


def test_a_vector_can_be_reported_as_its_mean(tmp_path: Path) -> None:
    """With reduce="mean", as torchmetrics' own macro average."""
    cfg = metric_cfg(tmp_path, dict(type=Curve, mapping=MAPPING, reduce="mean"))
    cfg["hooks"]["metrics"]["macro"] = dict(
        type="torchmetrics.classification.MulticlassAccuracy", num_classes=3, mapping=MAPPING
    )
    fit(cfg)
    rows = [r for r in rows_of(tmp_path) if r["final"]]
    assert [r["mine"] for r in rows] == pytest.approx([r["macro"] for r in rows])


def parameters_of(state: Any) -> dict[str, Tensor]:
    return {**state.params, **state.buffers}


@pytest.mark.parametrize("where", ["update", "compute"])
def test_a_metric_that_fails_later_is_switched_off(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three warnings, one for each epoch with a failure. No partial results. Training is bitwise the same."""
    plain = {**tiny_cfg(tmp_path / "plain"), "total_epochs": 5}
    entry = dict(type=Fails, where=where, after=1 + (4 if where == "update" else 1), mapping=OWN_MAPPING, phases=["val"])
    broken = {**metric_cfg(tmp_path / "broken", entry), "total_epochs": 5}
    a = fit(plain).state
    capsys.readouterr()
    b = fit(broken).state
    out = capsys.readouterr().out
    assert out.count("warning: cfg.hooks.metrics.mine: no val result of this epoch: ZeroDivisionError: no such luck") == 3
    assert out.count("it is switched off now") == 1
    assert [r["mine_samples"] for r in rows_of(tmp_path / "broken") if "mine_samples" in r] == [20.0]
    for name, value in parameters_of(a).items():
        assert torch.equal(value, parameters_of(b)[name]), name


class Stop(Exception):
    pass


def raising(step: int, *, name: str = "raising") -> Middleware[Any]:
    def wrap(train: Any) -> Any:
        def stopped(state: Any, batch: Any) -> Any:
            state, logs = train(state, batch)
            if state.at == step:
                raise Stop
            return state, logs

        return stopped

    return Middleware(name, wrap, "host")


RESUMED: dict[str, dict[str, Any]] = {
    "numbers": dict(type=Count, mapping=OWN_MAPPING),
    "sums": dict(type="torchmetrics.classification.MulticlassF1Score", num_classes=3, mapping=MAPPING),
    "collection": dict(type=Collection, mapping=MAPPING),
    "a list": dict(type=Hoarder, mapping=OWN_MAPPING),
    "every sample": dict(
        type="torchmetrics.classification.MulticlassAUROC", num_classes=3, mapping=MAPPING, probe=False, phases=["train"]
    ),
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("first", ["metrics", "checkpoint"])
@pytest.mark.parametrize("at", [7, 10])
def test_an_epoch_resumed_in_the_middle_has_the_whole_result(kind: str, at: int, first: str, tmp_path: Path) -> None:
    """What a training metric has gathered is saved, in either order of the hooks: the rows and the bytes of a run never stopped."""

    def cfg(folder: str, **more: Any) -> dict[str, Any]:
        saves = dict(checkpoint=dict(type="CheckpointHook", every_steps=1), resume=dict(type="ResumeHook"))
        made = metric_cfg(tmp_path / folder, dict(RESUMED[kind]), **saves, **more)
        made["hooks"] = {first: made["hooks"][first], **made["hooks"]}
        return made

    fit(cfg("whole"))
    with pytest.raises(Stop):
        fit(cfg("cut", raising=dict(type=raising, step=at)))
    fit(cfg("cut"))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert newest_state(tmp_path / "cut") == newest_state(tmp_path / "whole")


@pytest.mark.parametrize("at", [10, 15])
def test_a_signal_in_the_validation_costs_no_result_of_the_training(at: int, tmp_path: Path) -> None:
    """What a training metric has gathered is saved until its epoch is over, and so reported once, as by a run never stopped."""
    from tiny import Die

    def cfg(folder: str, **more: Any) -> dict[str, Any]:
        saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
        return metric_cfg(tmp_path / folder, dict(RESUMED["a list"]), **saves, **more)

    fit(cfg("whole"))
    with pytest.raises(Preempted):
        fit(cfg("cut", die=dict(type=Die, epoch=at // 5, by=int(signal.SIGTERM))))
    fit(cfg("cut"))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert newest_state(tmp_path / "cut") == newest_state(tmp_path / "whole")


def test_a_memory_that_cannot_be_saved_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A metric that gathers objects has no result of an epoch resumed in its midst, rather than that of a part; said once."""
    entry = dict(type=Opaque, mapping=OWN_MAPPING)
    saves = dict(checkpoint=dict(type="CheckpointHook", every_steps=1), resume=dict(type="ResumeHook"))
    with pytest.raises(Stop):
        fit(metric_cfg(tmp_path, dict(entry), **saves, raising=dict(type=raising, step=7)))
    capsys.readouterr()
    fit(metric_cfg(tmp_path, dict(entry), **saves))
    out = capsys.readouterr().out
    said = "warning: cfg.hooks.metrics.mine: no train result of this epoch: what it saw before step 6 is not saved"
    assert out.count(said) == 1
    finals = [r.get("mine_samples") for r in rows_of(tmp_path) if r["final"] and r["phase"] == "train"]
    assert finals == [50.0, None, 50.0]


def test_the_memory_of_a_metric_leaves_the_rest_of_the_state_alone(tmp_path: Path, aot_eager: None) -> None:
    """A class-style metric changes nothing of it, compiled with donation too."""
    compiled = dict(compile=True, total_epochs=1, workflow=[{"phase": "train"}])
    a = fit({**tiny_cfg(tmp_path / "a"), **compiled}).state
    b = fit({**metric_cfg(tmp_path / "b", dict(type=Count, mapping=OWN_MAPPING)), **compiled}).state
    for (path, x), (_, y) in zip(tree.items(a), tree.items(b), strict=True):
        assert torch.equal(x, y), path


def test_an_evaluation_takes_the_checkpoint_of_a_training(tmp_path: Path) -> None:
    """An evaluation does not need what training metrics gathered. Its results are those of the last epoch."""
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
    fit(metric_cfg(tmp_path, dict(type=Count, mapping=OWN_MAPPING), **saves))
    cfg = metric_cfg(tmp_path, dict(type=Count, mapping=OWN_MAPPING), **saves)
    result = fit({**cfg, "workflow": [{"phase": "val"}]})
    last = [r for r in rows_of(tmp_path) if r["phase"] == "val"]
    assert len(last) == 4 and last[3]["mine_share"] == last[2]["mine_share"] == result.metrics["val_mine_share"]


def both(pred: Tensor, label: Tensor, weight: Tensor | None = None) -> dict[str, Mean]:
    right = (pred.argmax(1) == label).float()
    return {"right": Mean.of(right, weight), "wrong": Mean.of(1 - right, weight)}


def test_a_traced_metric_may_return_several_means(tmp_path: Path) -> None:
    """A dict of Mean is several logs; Accuracy(topk=(1, 2)) is one."""
    cfg = tiny_cfg(tmp_path)
    mapped = {k: v for k, v in TOP1.items() if k == "mapping"}
    cfg["hooks"]["metrics"] |= {"two": dict(type="Accuracy", topk=(1, 2), **mapped), "own": dict(type=lambda: both, **mapped)}
    fit(cfg)
    for row in rows_of(tmp_path):
        assert row["two_top1"] == row["top1"] == pytest.approx(row["own_right"]) and row["two_top2"] >= row["two_top1"]
        assert row["own_right"] + row["own_wrong"] == pytest.approx(1.0)
