"""run(n) == run(k) + kill + resume(n - k), byte for byte: the state and the record do not show that a run was interrupted."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, cfg_file, ended, files_of, launch, newest_content, newest_state, rows_of, tiny_cfg

from ailab import remove_module_prefix
from ailab.errors import ConfigError, Preempted
from ailab.fit import fit, main
from ailab.stack import Middleware

SAVE = "checkpoint=dict(type='CheckpointHook', every_steps=2), resume=dict(type='ResumeHook')"
FEATURES = {
    "plain": "",
    "ema and a schedule by step": (
        "ema=dict(type='EMAHook', decay=0.9), lr=dict(type='LrSchedulerHook', by='step',"
        "scheduler=dict(type='WarmupAndCosineAnnealingLR', warmup_steps=4)), "
    ),
    "plateau": (
        "lr=dict(type='LrSchedulerHook', metric='val_top1', "
        "scheduler=dict(type='ReduceLROnPlateau', patience=0, threshold=0.5)), "
    ),
    "clip, accumulation, skipping": (
        "accumulate=dict(type='GradAccumulateHook', n=2), clip=dict(type='GradClipHook', max_norm=0.5),"
        "skip=dict(type='SkipNonFiniteHook', policy='skip'), "
    ),
    "mixing, two passes, averages": (
        "mixup=dict(type='MixupHook'), freeze=dict(type='FreezeHook', params=['first.*'], until=2), sam=dict(type='SAMHook'),"
        "spike=dict(type='SpikeHook', policy='skip', threshold=0.5, window=3), slow=dict(type='LookaheadHook', k=3),"
        "swa=dict(type='SWAHook', start=2), "
    ),
}
WORKERS = "cfg['data']['train'] = dict(type=NoisyPoints); cfg['data']['train_dataloader']['num_workers'] = 2"


def SaveDict(*, rate: float = 0.0) -> dict[str, Any]:
    return dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))


def run_of(folder: Path, hooks: str, *lines: str) -> int:
    folder.mkdir(exist_ok=True)
    return ended([cfg_file(folder, *lines, hooks=hooks)], folder / "log")


def assert_same_run(cut: Path, whole: Path) -> None:
    assert rows_of(cut / "run") == rows_of(whole / "run")
    assert newest_state(cut / "run") == newest_state(whole / "run")


@pytest.mark.parametrize("features", FEATURES)
def test_a_killed_run_ends_as_one_that_was_not(features: str, tmp_path: Path) -> None:
    """SIGKILL after a step, on a checkpoint and beside one, and in a validation: same state.pt, same metrics.jsonl."""
    hooks = FEATURES[features] + SAVE
    assert run_of(tmp_path / "whole", hooks) == 0
    for death in ("step=4", "step=7", "epoch=2", "step=13", "epoch=3"):
        assert run_of(tmp_path / "cut", f"{hooks}, die=dict(type=Die, {death})") == -signal.SIGKILL
    assert run_of(tmp_path / "cut", hooks) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_killed_at_any_time_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL from outside at random times, with worker processes and samples that draw random numbers."""
    hooks = FEATURES["ema and a schedule by step"] + SAVE
    more = [WORKERS, "cfg['total_epochs'] = 20"]
    assert run_of(tmp_path / "whole", hooks, *more) == 0
    (tmp_path / "cut").mkdir()
    argv, draw, kills = [cfg_file(tmp_path / "cut", *more, hooks=hooks)], random.Random(0), 0
    record = tmp_path / "cut" / "run" / "metrics.jsonl"
    for lines in (1, 5, 10, 16, 22, 30):  # of the 40 that there will be
        process = launch(argv, tmp_path / "cut" / "log")
        while process.is_alive() and not (record.exists() and record.read_bytes().count(b"\n") >= lines):
            process.join(0.001)
        process.join(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills
    assert ended(argv, tmp_path / "cut" / "log") == 0, (tmp_path / "cut" / "log").read_text()
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_number_of_workers_leaves_no_trace(tmp_path: Path) -> None:
    """Two workers, or none and a kill in between: the same bytes."""
    assert run_of(tmp_path / "whole", SAVE, WORKERS) == 0
    line = WORKERS.replace("= 2", "= 0")
    assert run_of(tmp_path / "cut", SAVE + ", die=dict(type=Die, step=8)", WORKERS) == -signal.SIGKILL
    assert run_of(tmp_path / "cut", SAVE, line) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("death", ["step=8", "epoch=2", "epoch=3", "step=15"])
@pytest.mark.parametrize("features", ["plateau", "ema and a schedule by step"])
def test_a_preempted_run_ends_as_one_that_was_not(features: str, death: str, tmp_path: Path) -> None:
    """SIGTERM in an epoch, in its validation, and at the very last step: saved, resumed, the same bytes."""
    hooks = FEATURES[features] + "checkpoint=dict(type='CheckpointHook'), resume=dict(type='ResumeHook')"
    assert run_of(tmp_path / "whole", hooks) == 0
    assert run_of(tmp_path / "cut", f"{hooks}, die=dict(type=Die, {death}, by={int(signal.SIGTERM)})") == 143
    assert run_of(tmp_path / "cut", hooks) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    whole, cut = ({p.name for p in (tmp_path / n / "run" / "checkpoints").iterdir()} for n in ("whole", "cut"))
    assert {n for n in cut if not n.startswith("step_")} == set() and max(cut) == max(whole)


def Stop(*, at: int, name: str) -> Middleware[Any]:
    """An exception after a step."""

    def wrap(step: Any) -> Any:
        def stopping(state: Any, batch: Any) -> Any:
            state, logs = step(state, batch)
            if state.at == at:
                raise InterruptedError
            return state, logs

        return stopping

    return Middleware(name, wrap, "host")


def test_an_exception_costs_what_a_kill_does(tmp_path: Path) -> None:
    """A run that was ended by an error in user code continues from its last checkpoint in the same process."""
    whole = fit(tiny_cfg(tmp_path / "whole" / "run", **SaveDict()))
    with pytest.raises(InterruptedError):
        fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict(), stop=dict(type=Stop, at=12)))
    cut = fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict()))
    assert cut.metrics == whole.metrics
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_run_continues_with_more_epochs(tmp_path: Path) -> None:
    """Two epochs, then a third, are three epochs."""
    fit(tiny_cfg(tmp_path / "whole" / "run", **SaveDict()))
    fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict()) | {"total_epochs": 2})
    fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict()))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_started_again_changes_no_file(tmp_path: Path) -> None:
    """Exit code 0, the same report, and every byte of the folder as it was, whatever hooks there are."""
    hooks = SAVE + ", ema=dict(type='EMAHook'), tensorboard=dict(type='TensorboardHook'), logger=dict(type='LoggerHook')"
    argv = [cfg_file(tmp_path, hooks=hooks)]
    assert main(argv) == 0
    before = files_of(tmp_path / "run")
    assert any("tensorboard" in name for name in before)
    assert main(argv) == 0
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("first", ["checkpoint", "tensorboard"])
def test_a_fresh_run_does_not_mix_with_an_earlier_one(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints in the work_dir and no ResumeHook: refused with exit code 2 before a byte is changed."""
    hooks = {"tensorboard": "tensorboard=dict(type='TensorboardHook')", "checkpoint": "checkpoint=dict(type='CheckpointHook')"}
    argv = [cfg_file(tmp_path, "cfg['seed'] = 5", hooks=", ".join([hooks.pop(first), *hooks.values()]))]
    assert main(argv) == 0
    before = files_of(tmp_path / "run")
    capsys.readouterr()
    assert main([*argv, "seed=6"]) == 2
    message = capsys.readouterr().err
    assert (
        "holds checkpoints of an earlier run, up to step 15" in message and "ResumeHook" in message and message.count("\n") == 2
    )
    assert files_of(tmp_path / "run") == before


def test_a_run_can_start_from_the_checkpoints_of_another(tmp_path: Path) -> None:
    """`resume_from` takes a folder of checkpoints (its newest) or one of them; the new run has a record of its own."""
    fit(tiny_cfg(tmp_path / "a" / "run", **SaveDict()) | {"total_epochs": 2})
    source = tmp_path / "a" / "run" / "checkpoints"
    whole = fit(tiny_cfg(tmp_path / "whole" / "run", **SaveDict()))
    for name, where in {"b": source, "c": source / "step_00000005"}.items():
        hooks = SaveDict() | {"resume": dict(type="ResumeHook", resume_from=str(where))}
        assert fit(tiny_cfg(tmp_path / name / "run", **hooks)).metrics == whole.metrics
        assert newest_state(tmp_path / name / "run") == newest_state(tmp_path / "whole" / "run")
    assert [r["epoch"] for r in rows_of(tmp_path / "b" / "run")] == [3, 3]
    assert [r["epoch"] for r in rows_of(tmp_path / "c" / "run")] == [2, 2, 3, 3]
    by_key = fit(tiny_cfg(tmp_path / "d" / "run", **SaveDict()) | {"resume_from": str(source)})
    assert by_key.metrics == whole.metrics


def test_a_run_that_started_from_another_continues_with_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted and started again with the same `resume_from` it does not start over; another `resume_from` is refused."""
    fit(tiny_cfg(tmp_path / "a", **SaveDict()) | {"total_epochs": 1})
    fit(tiny_cfg(tmp_path / "other", **SaveDict()) | {"total_epochs": 1, "seed": 8})
    hooks = SaveDict() | {"resume": dict(type="ResumeHook", resume_from=str(tmp_path / "a" / "checkpoints"), resume_lr=0.5)}
    fit(tiny_cfg(tmp_path / "whole" / "run", **hooks))
    with pytest.raises(InterruptedError):
        fit(tiny_cfg(tmp_path / "cut" / "run", **hooks, stop=dict(type=Stop, at=12)))
    capsys.readouterr()
    fit(tiny_cfg(tmp_path / "cut" / "run", **hooks))
    assert "step_00000010: step 10, 2 epochs done" in capsys.readouterr().out
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    hooks["resume"]["resume_from"] = str(tmp_path / "other" / "checkpoints")
    before = files_of(tmp_path / "cut" / "run")
    with pytest.raises(ConfigError, match="holds checkpoints of another run, up to step 15"):
        fit(tiny_cfg(tmp_path / "cut" / "run", **hooks))
    assert files_of(tmp_path / "cut" / "run") == before


def test_a_source_without_a_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with a `resume_from` that does not exist does not start new: exit code 5."""
    hooks = f"resume=dict(type='ResumeHook', resume_from={str(tmp_path / 'nowhere')!r})"
    assert main([cfg_file(tmp_path, hooks=hooks)]) == 5
    assert "nowhere': there is no checkpoint there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resume_lr", "expected"), [("keep", [0.0025, 0.00125]), ("initial", [0.01, 0.005]), (0.4, [0.4, 0.2])]
)
def test_resume_lr_keeps_or_restarts_the_schedule(resume_lr: Any, expected: list[float], tmp_path: Path) -> None:
    """With a rate halved each epoch: "keep" continues, "initial" restarts at the rate of the cfg, a float at that rate."""
    schedule = dict(type="LrSchedulerHook", scheduler=dict(type="StepLR", step_size=1, gamma=0.5))
    hooks = dict(lr_scheduler=schedule, **SaveDict())
    fit(tiny_cfg(tmp_path / "a", **hooks) | {"total_epochs": 2})
    assert [r["lr"] for r in rows_of(tmp_path / "a")][::2] == [[0.01], [0.005]]
    hooks["resume"] = dict(type="ResumeHook", resume_from=str(tmp_path / "a" / "checkpoints"), resume_lr=resume_lr)
    fit(tiny_cfg(tmp_path / "b", **hooks) | {"total_epochs": 4})
    assert [r["lr"][0] for r in rows_of(tmp_path / "b")][::2] == pytest.approx(expected)


@pytest.mark.parametrize(("resume_lr", "expected"), [("keep", 0.01), ("initial", 0.02), (0.3, 0.3)])
def test_resume_lr_without_a_schedule(resume_lr: Any, expected: float, tmp_path: Path) -> None:
    """The rate of the checkpoint, if that is accepted, of the new cfg, or the one that is said; as a key of the cfg too."""
    fit(tiny_cfg(tmp_path / "a", **SaveDict()) | {"total_epochs": 1})
    cfg = tiny_cfg(tmp_path / "a", **SaveDict()) | {"total_epochs": 2, "resume_lr": resume_lr}
    cfg["optimizer"]["lr"] = 0.02
    if resume_lr == "keep":
        with pytest.raises(ConfigError, match=r"cfg.optimizer.lr: 0.01 -> 0.02\n.*\n.*cfg.hooks.resume.resume_lr=0.02"):
            fit(cfg)
        cfg["hooks"]["resume"]["changed"] = "accept"
    fit(cfg)
    assert [r["lr"] for r in rows_of(tmp_path / "a")][2:] == [[expected]] * 2


def test_a_checkpoint_can_be_used_without_ailab(tmp_path: Path) -> None:
    """`model_state` loads into the user's module, `optimizer_state` into torch's optimizer, and both continue as the run would."""
    cfg = tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook"))
    result = fit(cfg | {"workflow": [{"phase": "train"}]})
    content = newest_content(tmp_path / "run")
    model = Net()
    model.load_state_dict(remove_module_prefix(content["model_state"]))
    model.load_state_dict(remove_module_prefix({f"module.{n}": v for n, v in content["model_state"].items()}))
    assert content["epoch"] == 3 and content["step"] == 15
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        mine = result.state.params if name in result.state.params else result.state.buffers
        assert torch.equal(value, mine[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer.load_state_dict(content["optimizer_state"])
    assert optimizer.param_groups[0]["lr"] == 0.01
    for name, value in model.named_parameters():
        assert torch.equal(optimizer.state[value]["exp_avg"], result.state.opt_state["exp_avg"][name])
        assert float(optimizer.state[value]["step"]) == 15


def test_an_interrupted_run_in_this_process_can_continue(tmp_path: Path) -> None:
    """`fit` raises Preempted, restores the handlers of the process, and can be called again."""
    from tiny import Die

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by a signal at step 6"):
        fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict(), die=dict(type=Die, step=6, by=signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == before
    fit(tiny_cfg(tmp_path / "cut" / "run", **SaveDict()))
    fit(tiny_cfg(tmp_path / "whole" / "run", **SaveDict()))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
