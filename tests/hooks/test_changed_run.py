"""Going on with another run than was begun: refused line by line, or accepted and written down; what may change freely does."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_resume import Stop
from tiny import Net, Points, cfg_file, files_of, newest_content, newest_state, rows_of, tiny_cfg

from ailab.errors import CheckpointError, ConfigError, WorkDirError
from ailab.fit import fit
from ailab.stack import Middleware
from ailab.workdir import durable
from ailab.workdir.folder import lock

Change = Callable[[dict[str, Any]], Any]


class Scaled(Net):
    """A net with a constant, which is no parameter."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, input: Any) -> Any:
        return self.scale * super().forward(input)


def run_cfg(folder: Path, **resume: Any) -> dict[str, Any]:
    hooks = dict(
        accumulate=dict(type="GradAccumulateHook", n=1),
        clip=dict(type="GradClipHook", max_norm=10.0),
        ema=dict(type="EMAHook", decay=0.9),
        lr=dict(type="LrSchedulerHook", by="epoch", scheduler=dict(type="StepLR", step_size=1, gamma=0.5)),
        checkpoint=dict(type="CheckpointHook", keep=dict(last=9)),
        resume=dict(type="ResumeHook", **resume),
    )
    made = tiny_cfg(folder, **hooks)
    return made | {"model": dict(type=Scaled), "optimizer": dict(type="AdamW", lr=0.1, betas=[0.9, 0.999]), "total_epochs": 2}


def changed(folder: Path, change: Change, **resume: Any) -> dict[str, Any]:
    cfg = run_cfg(folder, **resume) | {"total_epochs": 4}
    change(cfg)
    return cfg


def steps_per_epoch(cfg: dict[str, Any], batch_size: int) -> None:
    cfg["data"]["train_dataloader"]["batch_size"] = batch_size


REFUSED: dict[str, tuple[Change, str]] = {
    "lr": (lambda c: c["optimizer"].update(lr=0.2), "cfg.optimizer.lr: 0.1 -> 0.2"),
    "weight decay": (lambda c: c["optimizer"].update(weight_decay=0.5), "cfg.optimizer.weight_decay: 0.01 -> 0.5"),
    "betas": (lambda c: c["optimizer"].update(betas=[0.8, 0.999]), "cfg.optimizer.betas.0: 0.9 -> 0.8"),
    "seed": (lambda c: c.update(seed=2), "cfg.seed: 1 -> 2"),
    "other samples": (lambda c: c["data"]["train"].update(seed=7), "cfg.data.train.seed: 0 -> 7"),
    "fewer samples": (lambda c: c["data"]["train"].update(n=40), "training steps of an epoch: 5 -> 4"),
    "the val split": (lambda c: c["data"].update(train=dict(c["data"]["val"])), "cfg.data.train.n: 50 -> 20"),
    "validation": (lambda c: c["data"]["val"].update(seed=7), "cfg.data.val.seed: 1 -> 7"),
    "batch": (lambda c: steps_per_epoch(c, 10), "cfg.data.train_dataloader.batch_size: 11 -> 10"),
    "drop_last": (
        lambda c: c["data"]["train_dataloader"].update(drop_last=True),
        "cfg.data.train_dataloader.drop_last: False -> True",
    ),
    "iters": (lambda c: c["workflow"][0].update(iters=3), "cfg.workflow.train.iters: None -> 3"),
    "phases": (lambda c: c["workflow"].reverse(), "order of cfg.workflow: train, val -> val, train"),
    "smoothing": (lambda c: c["loss"].update(label_smoothing=0.1), "cfg.loss.label_smoothing: 0 -> 0.1"),
    "a constant": (lambda c: c["model"].update(scale=2.0), "cfg.model.scale: 1 -> 2"),
    "decay": (lambda c: c["hooks"]["ema"].update(decay=0.99), "cfg.hooks.ema.decay: 0.9 -> 0.99"),
    "schedule": (lambda c: c["hooks"]["lr"]["scheduler"].update(gamma=0.1), "cfg.hooks.lr.scheduler.gamma: 0.5 -> 0.1"),
    "a hook less": (lambda c: c["hooks"].pop("ema"), "cfg.hooks.ema.type: 'EMAHook' -> nothing"),
    "a hook off": (lambda c: c["hooks"]["ema"].update(enable=False), "cfg.hooks.ema.type: 'EMAHook' -> nothing"),
    "a hook more": (lambda c: c["hooks"].update(mix=dict(type="MixupHook")), "cfg.hooks.mix.type: nothing -> 'MixupHook'"),
    "a metric more": (
        lambda c: c["hooks"]["metrics"].update(top2={**c["hooks"]["metrics"]["top1"], "type": "Accuracy", "topk": 2}),
        "cfg.hooks.metrics.top2.topk: nothing -> 2",
    ),
    "the order": (
        lambda c: c.update(hooks={"clip": c["hooks"]["clip"], **c["hooks"]}),
        "order of cfg.hooks: metrics, accumulate, clip, ema, lr -> clip, metrics, accumulate, ema, lr",
    ),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; nobody changes its folder."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    fit(run_cfg(folder))
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_results_depend_on_is_refused_line_by_line(what: str, begun: Path) -> None:
    """Each difference is `key: old -> new`, with both ways out, and no byte of the run is changed; metrics are in its results."""
    change, line = REFUSED[what]
    before = files_of(begun)
    with pytest.raises(ConfigError) as caught:
        fit(changed(begun, change))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("cfg.hooks.resume: ") and lines[0].endswith("step_00000010 is of another run.")
    assert f"  {line}" in lines
    assert "another work_dir" in str(caught.value) and "cfg.hooks.resume.changed='accept'" in str(caught.value)
    assert files_of(begun) == before


FREE: dict[str, Change] = {
    "observers": lambda c: c["hooks"].update(
        logger=dict(type="LoggerHook", interval=2), tensorboard=dict(type="TensorboardHook", histograms=1)
    ),
    "checkpoints": lambda c: c["hooks"]["checkpoint"].update(every_steps=2, keep=dict(last=3)),
    "workers": lambda c: c["data"]["train_dataloader"].update(num_workers=1, timeout=60),
    "a limit of bad samples": lambda c: c["data"].update(max_bad_frac=0.5),
    "a default written out": lambda c: (c["optimizer"].update(weight_decay=1e-2), c["hooks"]["ema"].update(warmup=True)),
    "1 for 1.0": lambda c: c["model"].update(scale=1),
    "an observer of one's own": lambda c: c["hooks"].update(mine=dict(type=Stop, at=999)),
    "an early stop": lambda c: c["hooks"].update(stop=dict(type="EarlyStopHook", patience=9)),
}


@pytest.mark.parametrize("what", FREE)
def test_what_results_do_not_depend_on_changes_freely(what: str, tmp_path: Path) -> None:
    """More epochs, observers, intervals, workers: parameters and results are those of the run that always had them."""
    fit(run_cfg(tmp_path / "cut"))
    before = (tmp_path / "cut" / "config.json").read_bytes()
    cut = fit(changed(tmp_path / "cut", FREE[what])).state
    whole = fit(changed(tmp_path / "whole", FREE[what])).state
    assert all(torch.equal(p, whole.params[n]) for n, p in cut.params.items()) and cut.at == 20
    assert [r for r in rows_of(tmp_path / "cut") if r["final"]] == [r for r in rows_of(tmp_path / "whole") if r["final"]]
    assert (tmp_path / "cut" / "config.json").read_bytes() == before
    assert json.loads((tmp_path / "cut" / "config_step_00000010.json").read_text())["total_epochs"] == 4


# Accepted.


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 10), (25, 2)])
def test_an_accepted_change_goes_on_at_the_epochs_end(batch_size: int, steps: int, tmp_path: Path) -> None:
    """Epochs of another length follow, lr by epoch follows the epoch's number, and the change is written down three times."""
    fit(run_cfg(tmp_path))
    fit(changed(tmp_path, lambda c: steps_per_epoch(c, batch_size), changed="accept"))
    rows = [(r["epoch"], r["step"], r["lr"][0]) for r in rows_of(tmp_path) if r["final"] and r["phase"] == "train"]
    assert rows == [(1, 5, 0.1), (2, 10, 0.05), (3, 10 + steps, 0.025), (4, 10 + 2 * steps, 0.0125)]
    lines = [f"cfg.data.train_dataloader.batch_size: 11 -> {batch_size}", f"training steps of an epoch: 5 -> {steps}"]
    manifest = json.loads((tmp_path / "checkpoints" / f"step_{10 + 2 * steps:08d}" / "manifest.json").read_text())
    assert manifest["fingerprint"]["accepted"] == [[10, lines]]
    log = (tmp_path / "train.log").read_text().splitlines()
    at = log.index("warning: going on from step 10 with another run than was begun:")
    assert log[at + 1 : at + 3] == [f"  {line}" for line in lines]
    sizes = {p.name: json.loads(p.read_text())["data"]["train_dataloader"]["batch_size"] for p in tmp_path.glob("config*.json")}
    assert sizes == {"config.json": 11, "config_step_00000010.json": batch_size}
    fit(changed(tmp_path, lambda c: steps_per_epoch(c, batch_size)) | {"total_epochs": 5})  # it is the run that it is now
    with pytest.raises(ConfigError, match=f"batch_size: {batch_size} -> 11"):
        fit(changed(tmp_path, lambda c: None))


def test_an_epoch_that_was_begun_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 5 steps 2 were made, then 50 samples are 10 steps: epoch 2 has those 10, its result is theirs, and both is said."""
    cfg = run_cfg(tmp_path)
    cfg["hooks"] |= {"checkpoint": dict(type="CheckpointHook", every_steps=1), "stop": dict(type=Stop, at=8)}
    with pytest.raises(InterruptedError):
        fit(cfg)
    capsys.readouterr()
    fit(changed(tmp_path, lambda c: steps_per_epoch(c, 5), changed="accept") | {"total_epochs": 2})
    assert "epoch 2 is begun anew at step 7: 2 steps of it were made as they were before" in capsys.readouterr().out
    rows = [(r["epoch"], r["step"]) for r in rows_of(tmp_path) if r["final"]]
    assert rows == [(1, 5), (1, 5), (2, 17), (2, 17)]
    last = rows_of(tmp_path)[-2]
    assert (last["top1"] * 50) == pytest.approx(round(last["top1"] * 50))  # a share of 50 samples


def test_new_memory_begins_where_the_run_goes_on(tmp_path: Path) -> None:
    """An average that is new is that of the parameters from there on, and one that is gone is left behind."""
    fit(run_cfg(tmp_path))
    saved = newest_content(tmp_path)["state"]["params"]
    ema = {"slow": dict(type="EMAHook", decay=1.0, warmup=False)}
    state = fit(changed(tmp_path, lambda c: (c["hooks"].pop("ema"), c["hooks"].update(ema)), changed="accept")).state
    assert "ema" not in state.slots
    assert all(torch.equal(p, state.slots["slow"][n]) for n, p in saved.items())


def test_a_metric_more_counts_from_the_next_epoch_on(tmp_path: Path) -> None:
    """Accepted, the sums of an epoch get a row more: of the same samples as the metric beside it."""
    fit(run_cfg(tmp_path))
    fit(changed(tmp_path, lambda c: c["hooks"]["metrics"].update(again=c["hooks"]["metrics"]["top1"]), changed="accept"))
    rows = [r for r in rows_of(tmp_path) if r["final"]]
    assert [r.get("again") for r in rows] == [None] * 4 + [r["top1"] for r in rows[4:]]


@pytest.mark.parametrize(("scheduled", "rates"), [(False, [0.1, 0.1]), (True, [0.2 * 0.25, 0.2 * 0.125])])
def test_which_learning_rate_goes_on_is_said(
    scheduled: bool, rates: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """resume_lr='keep' with another lr in the cfg: a line says whether it is the old one or the schedule from the new one."""

    def change(cfg: dict[str, Any]) -> None:
        cfg["hooks"]["lr"]["enable"] = scheduled

    first = run_cfg(tmp_path)
    change(first)
    fit(first)
    capsys.readouterr()
    second = changed(tmp_path, lambda c: (change(c), c["optimizer"].update(lr=0.2)), changed="accept")
    fit(second)
    assert [r["lr"][0] for r in rows_of(tmp_path)][4::2] == pytest.approx(rates)
    goes = "follows the schedule from the cfg's 0.2 on" if scheduled else "goes on as it was"
    assert f"The learning rate {goes} (resume_lr='keep')." in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [5, 25])
def test_a_schedule_as_long_as_the_run_keeps_its_place(batch_size: int, tmp_path: Path) -> None:
    """Cosine by step: half of the epochs are half of the way, and the last step is as far as ever, whatever the epochs' length."""

    def cosine(cfg: dict[str, Any]) -> None:
        schedule = dict(type="WarmupAndCosineAnnealingLR", warmup_steps=0)
        cfg["hooks"]["lr"] = dict(type="LrSchedulerHook", by="step", scheduler=schedule)
        cfg["total_epochs"] = 4

    first = changed(tmp_path, cosine)
    first["hooks"]["stop"] = dict(type=Stop, at=11)
    with pytest.raises(InterruptedError):
        fit(first)
    fit(changed(tmp_path, lambda c: (cosine(c), steps_per_epoch(c, batch_size)), changed="accept"))
    steps, last = 50 // batch_size, rows_of(tmp_path)[-1]
    assert last["step"] == 10 + 2 * steps
    assert last["lr"][0] == pytest.approx(0.05 * (1 + math.cos(math.pi * (4 * steps - 1) / (4 * steps))))


def test_a_schedule_with_a_length_of_its_own_counts_steps(tmp_path: Path) -> None:
    """Halved every 12 steps: so it is after a change of the epochs' length, and past the steps that the cfg alone makes of it."""

    def halved(cfg: dict[str, Any]) -> None:
        cfg["hooks"]["lr"] = dict(type="LrSchedulerHook", by="step", scheduler=dict(type="StepLR", step_size=12, gamma=0.5))

    first = run_cfg(tmp_path)
    halved(first)
    fit(first)
    fit(changed(tmp_path, lambda c: (halved(c), steps_per_epoch(c, 25)), changed="accept") | {"total_epochs": 9})
    rows = [(r["step"], r["lr"][0]) for r in rows_of(tmp_path) if r["phase"] == "train"]
    assert rows == [(s, 0.1 * 0.5 ** ((s - 1) // 12)) for s in (5, 10, 12, 14, 16, 18, 20, 22, 24)]


def test_averages_and_frozen_layers_by_epoch_follow_the_epochs(tmp_path: Path) -> None:
    """After a change of the epochs' length SWA takes the parameters at the epochs' ends, and a freeze ends with its epoch."""

    def by_epoch(cfg: dict[str, Any]) -> None:
        cfg["hooks"] |= {"swa": dict(type="SWAHook", start=3), "freeze": dict(type="FreezeHook", params=["last.*"], until=3)}

    first = changed(tmp_path, by_epoch)
    first["hooks"]["die"] = dict(type=Stop, at=11)
    with pytest.raises(InterruptedError):
        fit(first)
    frozen = newest_content(tmp_path)["state"]["params"]["last.weight"]
    cfg = changed(tmp_path, lambda c: (by_epoch(c), steps_per_epoch(c, 25)), changed="accept")
    at_ends = [fit({**copy.deepcopy(cfg), "total_epochs": n}).state for n in (3, 4)]
    assert torch.equal(at_ends[0].params["last.weight"], frozen) and not torch.equal(at_ends[1].params["last.weight"], frozen)
    assert int(at_ends[1].slots["swa"]["n"]) == 2
    mean = (at_ends[0].params["first.weight"] + at_ends[1].params["first.weight"]) / 2
    torch.testing.assert_close(at_ends[1].slots["swa"]["mean"]["first.weight"], mean)


# What cannot be continued, accepted or not.


@pytest.mark.parametrize("accept", ["refuse", "accept"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(model=dict(type=Net, width=9)), "cfg.model, parameter first.weight: checkpoint has float32 (8, 4)"),
        (lambda c: c.update(optimizer=dict(type="SGD", lr=0.1)), "cfg.optimizer, its exp_avg.first.weight: checkpoint has"),
        (lambda c: c["optimizer"].update(type="Adam"), "the memory of one optimizer is not that of another"),
        (lambda c: c["optimizer"].update(amsgrad=True), "cfg.optimizer.amsgrad: False -> True"),
    ],
)
def test_what_does_not_fit_is_refused_in_words_of_the_cfg(change: Change, words: str, accept: str, tmp_path: Path) -> None:
    """Another shape or another optimizer: where in the cfg, what there was and what there is; accepting does not help."""
    fit(run_cfg(tmp_path))
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        fit(changed(tmp_path, change, changed=accept))
    assert words in str(caught.value) and "slots." not in str(caught.value) and "accept" not in str(caught.value)
    assert files_of(tmp_path) == before


def test_what_costs_bits_alone_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another number of threads, and compiling to another extent, go on and are told."""
    fit(run_cfg(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        capsys.readouterr()
        fit(changed(tmp_path, lambda c: None))
    finally:
        torch.set_num_threads(threads)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not bit for bit")]
    assert lines == [f"not bit for bit: threads: {threads} -> {threads + 1}"]


def test_other_code_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose source is not what it was is said by its place in the cfg."""
    fit(run_cfg(tmp_path))
    capsys.readouterr()
    found = __import__("inspect").getsource
    monkeypatch.setattr("inspect.getsource", lambda obj: found(obj) + ("#" if obj is Scaled else ""))
    fit(changed(tmp_path, lambda c: None))
    out = capsys.readouterr().out
    assert out.count("warning: the code of cfg.model is not the one that the run was begun with") == 1


def test_a_file_that_changed_is_seen_though_the_cfg_is_the_same(tmp_path: Path) -> None:
    """The first, the middle and the last sample are looked at, in the phases of the run."""

    class Lines:
        def __init__(self, path: str):
            self.values = [float(line) for line in Path(path).read_text().split()]

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input": torch.full((4,), self.values[index]), "target": torch.tensor(index % 3)}

    file = tmp_path / "values"
    for place in (0, 25, 49):
        values = [float(i) for i in range(50)]
        file.write_text(" ".join(map(str, values)))
        cfg = run_cfg(tmp_path / f"run{place}")
        cfg["data"]["train"] = dict(type=Lines, path=str(file))
        fit(cfg)
        file.write_text(" ".join(str(v + (i == place)) for i, v in enumerate(values)))
        with pytest.raises(ConfigError, match=r"samples of cfg.data.train: 50, content \w+ -> 50, content \w+"):
            fit(cfg | {"total_epochs": 3})


def test_samples_that_are_random_do_not_hinder_a_resumption(tmp_path: Path) -> None:
    """Data that come out otherwise each time have no content to compare."""

    class Clock:
        def __init__(self) -> None:
            self.calls = 0

        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.calls += 1
            return {"input": torch.full((4,), float(self.calls)), "target": torch.tensor(index % 3)}

    cfg = run_cfg(tmp_path)
    cfg["data"]["train"] = dict(type=Clock)
    fit(cfg)
    assert fit(cfg | {"total_epochs": 3}).state.at == 15


def test_a_secret_is_not_in_the_manifest(tmp_path: Path) -> None:
    """What config.json hides, by its key or in a URL, a checkpoint hides too."""

    def Fetched(*, api_key: str, url: str) -> Any:
        return Points()

    cfg = run_cfg(tmp_path)
    cfg["data"]["train"] = dict(type=Fetched, api_key="hunter2", url="https://me:hunter2@host/x?token=hunter2")
    fit(cfg)
    text = (tmp_path / "checkpoints" / "step_00000010" / "manifest.json").read_text()
    assert "hunter2" not in text and "cfg.data.train.api_key" in text and "host/x" in text


# Another run on purpose.


def test_a_run_from_another_is_not_compared(tmp_path: Path) -> None:
    """Other data, batch, optimizer and frozen layers: epochs 3 and 4 are those of the new data, the model is the old one."""
    fit(run_cfg(tmp_path / "a"))
    old = newest_content(tmp_path / "a")["state"]["params"]

    def other(cfg: dict[str, Any]) -> None:
        cfg["data"]["train"] = dict(type=Points, n=30, seed=9)
        steps_per_epoch(cfg, 10)
        cfg["optimizer"] = dict(type="SGD", lr=0.01, momentum=0.9, freeze=["first.*"])
        cfg["hooks"].pop("ema")
        cfg["hooks"]["slow"] = dict(type="EMAHook", decay=1.0, warmup=False)

    state = fit(changed(tmp_path / "b", other, resume_from=str(tmp_path / "a" / "checkpoints"))).state
    assert state.at == 10 + 2 * 3
    assert torch.equal(state.params["first.weight"], old["first.weight"])
    assert torch.equal(state.slots["slow"]["last.weight"], old["last.weight"])
    assert not torch.equal(state.params["last.weight"], old["last.weight"])
    manifest = json.loads((tmp_path / "b" / "checkpoints" / "step_00000016" / "manifest.json").read_text())
    assert manifest["fingerprint"]["accepted"] == [] and manifest["fingerprint"]["results"]["cfg.data.train.n"] == "30"


def test_a_run_from_the_midst_of_another_begins_its_epoch(tmp_path: Path) -> None:
    """A checkpoint after 7 of 5 + 5 steps, and data of 3 steps: epoch 2 has these 3; with the same data it has the 3 left."""
    first = run_cfg(tmp_path / "a")
    first["hooks"] |= {"checkpoint": dict(type="CheckpointHook", every_steps=1), "stop": dict(type=Stop, at=8)}
    with pytest.raises(InterruptedError):
        fit(first)
    source = dict(resume_from=str(tmp_path / "a" / "checkpoints" / "step_00000007"))
    for folder, change in (("b", lambda c: c["data"]["train"].update(n=33)), ("c", lambda c: None)):
        fit(changed(tmp_path / folder, change, **source) | {"total_epochs": 2})
        assert [(r["epoch"], r["step"]) for r in rows_of(tmp_path / folder) if r["final"]] == [(2, 10), (2, 10)]


# When it ends.


def ended(folder: Path, values: list[float], epochs: int = 12, **stop: Any) -> tuple[int, dict[str, Any]]:
    from test_early_stop import fed

    hooks = {"fed": dict(type=fed, values=values), "stop": dict(type="EarlyStopHook", **stop)} if stop else {}
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
    state = fit(tiny_cfg(folder, **hooks, **saves) | {"total_epochs": epochs}).state
    return int(state.slots["progress"]["epoch"]), state.slots


def test_an_early_stop_is_not_obeyed_for_ever(tmp_path: Path) -> None:
    """The same cfg stays ended; more patience stops where it always would have; more epochs get patience anew; no hook, no end."""
    values = [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5]
    assert ended(tmp_path, values, patience=2)[0] == 4
    assert ended(tmp_path, values, patience=2)[0] == 4
    assert ended(tmp_path, values, patience=5)[0] == 7
    assert ended(tmp_path, values, patience=5, epochs=13)[0] == 12
    assert ended(tmp_path, values, patience=5, epochs=13)[0] == 12
    assert ended(tmp_path, values, epochs=14)[0] == 14


def test_a_run_from_one_that_stopped_goes_on(tmp_path: Path) -> None:
    """`resume_from` takes neither the stop nor the best value, which is that of another run."""
    from test_early_stop import fed

    assert ended(tmp_path / "a", [1.0, 2.0, 3.0], patience=2)[0] == 3
    hooks = dict(
        fed=dict(type=fed, values=[0, 0, 0, 9.0, 8.0, 8.5, 8.5, 8.5]),
        stop=dict(type="EarlyStopHook", patience=2),
        resume=dict(type="ResumeHook", resume_from=str(tmp_path / "a" / "checkpoints")),
    )
    state = fit(tiny_cfg(tmp_path / "b", **hooks) | {"total_epochs": 9}).state
    assert int(state.slots["progress"]["epoch"]) == 7 and float(state.slots["stop"]["best"]) == 8.0


def Enough(*, after: int, name: str) -> Middleware[Any]:
    """A user's own end of a run."""
    from ailab.core.epoch import ask_to_stop, epochs_done

    def wrap(epoch: Any) -> Any:
        def watched(state: Any, batches: Any) -> Any:
            state, logs = epoch(state, batches)
            return (ask_to_stop(state) if epochs_done(state) >= after else state), logs

        return watched

    return Middleware(name, wrap, "epoch")


def test_an_end_of_ones_own_is_one(tmp_path: Path) -> None:
    """A hook that asks to stop is obeyed until it, or the number of epochs, changes."""

    def until(after: int, epochs: int) -> int:
        saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
        cfg = tiny_cfg(tmp_path, **saves, enough=dict(type=Enough, after=after))
        return int(fit(cfg | {"total_epochs": epochs}).state.slots["progress"]["epoch"])

    assert [until(2, 9), until(2, 9), until(4, 9), until(4, 10)] == [2, 2, 4, 5]


# Folders.


def test_the_folder_of_the_checkpoints_is_held(tmp_path: Path) -> None:
    """Two work_dirs and one save_dir: the second run is told who holds it (6) and writes nothing; so with another's checkpoints."""
    for held, save_dir in (("shared", "shared"), ("other", "other/checkpoints")):
        hooks = dict(checkpoint=dict(type="CheckpointHook", save_dir=str(tmp_path / save_dir)))
        file = cfg_file(tmp_path, f"cfg['work_dir'] = {str(tmp_path / f'run_{held}')!r}", f"cfg['hooks'].update({hooks!r})")
        with lock(tmp_path / held):
            assert tiny.ended([file], tmp_path / "log") == WorkDirError.exit_code
        assert f"is in use by process {os.getpid()}" in (tmp_path / "log").read_text()
        assert not list((tmp_path / held).rglob("step_*"))
        assert fit(tiny_cfg(tmp_path / f"run_{held}", **hooks)).state.at == 15  # once it is free


def best_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "best.json").read_text())


@pytest.mark.parametrize(("metric", "pick"), [("val_loss", min), ("val_top1", max)])
def test_the_best_is_kept_named_and_told(metric: str, pick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """best.json names the checkpoint of the lowest loss, the highest accuracy, that is there; its path is told at the end."""
    values = [3.0, 1.0, 2.5, 1.5, 2.0]
    from test_early_stop import fed

    hooks = dict(
        checkpoint=dict(type="CheckpointHook", keep=dict(last=2, best=1, metric=metric)), resume=dict(type="ResumeHook")
    )
    more = dict(fed=dict(type=fed, values=[*values, 0.5])) if metric == "val_loss" else {}
    cfg = tiny_cfg(tmp_path, **more, **hooks)
    fit(cfg | {"total_epochs": 5})
    results = {
        r["step"]: values[r["epoch"] - 1] if more else r["top1"]
        for r in rows_of(tmp_path)
        if r["phase"] == "val" and r["final"]
    }
    value = pick(results.values())
    step = max(s for s, v in results.items() if v == value)  # of equals the later
    found = best_of(tmp_path)
    assert (found["step"], found["value"], found["metric"], found["mode"]) == (step, value, metric, pick.__name__)
    kept = {p.name for p in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {found["path"], "step_00000020", "step_00000025"}
    assert f"best checkpoint      {tmp_path / 'checkpoints' / found['path']} ({metric} {value:.4f}" in capsys.readouterr().out
    if more:
        fit(cfg | {"total_epochs": 6})
        assert best_of(tmp_path)["step"] == 30 and best_of(tmp_path)["value"] == 0.5


def test_best_json_agrees_with_what_is_there_after_a_resumption(tmp_path: Path) -> None:
    """It is written in one piece, and again when a run that was killed before that goes on; or goes with what it named."""
    keep = dict(last=2, best=1, metric="val_top1")
    cfg = tiny_cfg(tmp_path, checkpoint=dict(type="CheckpointHook", keep=keep), resume=dict(type="ResumeHook"))
    fit(cfg)
    right = best_of(tmp_path)
    durable.replace(tmp_path / "checkpoints" / "best.json", b'{"path":"step_00000001"}\n')
    fit(cfg)
    assert best_of(tmp_path) == right
    before = newest_state(tmp_path)
    fit(cfg)
    assert newest_state(tmp_path) == before


@pytest.mark.parametrize("keep", [True, False])
def test_what_nobody_calls_better_has_to_be_said(keep: bool, tmp_path: Path) -> None:
    """A metric of one's own without `higher_is_better`, to be kept or stopped by: an error that asks for the mode, and no run."""
    from test_metric_hook import OWN_MAPPING, Count

    class Unsaid(Count):
        higher_is_better = None

    def cfg(**mode: Any) -> dict[str, Any]:
        entry = dict(last=2, best=1, metric="val_mine_share", **mode)
        hooks = dict(
            checkpoint=dict(type="CheckpointHook", keep=entry if keep else None),
            **({} if keep else dict(stop=dict(type="EarlyStopHook", metric="val_mine_share", **mode))),
        )
        made = tiny_cfg(tmp_path / "run", **hooks)
        made["hooks"]["metrics"]["mine"] = dict(type=Unsaid, mapping=OWN_MAPPING)
        return made

    path = "cfg.hooks.checkpoint.keep.mode" if keep else "cfg.hooks.stop.mode"
    with pytest.raises(ConfigError) as caught:
        fit(cfg())
    assert str(caught.value).startswith(f"{path}: ") and "mode='min' or mode='max'" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert fit(cfg(mode="max")).state.at == 15
