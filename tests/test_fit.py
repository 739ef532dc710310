"""The command line as a user meets it: one clear message and a documented exit code, or a finished run and its record."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TESTS, cfg_file, ended, epochs_of, files_of, launch, newest_content, rows_of, tiny_cfg
from torch import nn

from ailab.errors import ConfigError
from ailab.fit import fit, main
from ailab.hooks.observe.scalars import Report

ROOT = TESTS.parent
Cap = pytest.CaptureFixture[str]


class NoParameters(nn.Module):
    def forward(self, input: Any) -> Any:
        return input[:, :3]


class Refuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise KeyError("no such backbone")


class Wide(nn.Module):
    def forward(self, output: Any, target: Any) -> Any:
        return output * target[:, None]


class Loud(nn.Module):
    def forward(self, output: Any, target: Any) -> Any:
        return "big"


class Unlucky(nn.Module):
    def __init__(self) -> None:
        raise ValueError("no such loss")


class Texts:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return {"text": str(index), "more": {"label": "b"}}


class NoFile:
    def __init__(self, path: str):
        self.lines = open(path).readlines()  # noqa: SIM115


def Broken(*, name: str) -> Any:
    return 3


BAD: dict[str, tuple[str, int, str]] = {
    "a cfg that raises": ("raise ValueError('no luck')", 2, r"tiny_exp\.py, line 4: ValueError: no luck"),
    "no cfg": ("del cfg", 2, "defines no `cfg`"),
    "a cfg that is no dict": ("cfg = 3", 2, "`cfg` has to be a dict, got int"),
    "an unknown key": ("cfg['optimzer'] = {}", 2, r"cfg\.optimzer: .*\n.*Did you mean 'optimizer'"),
    "an unknown type": ("cfg['optimizer']['type'] = 'AdmW'", 2, "no optimizer 'AdmW'.\n.*Did you mean 'AdamW'"),
    "an unknown argument": (
        "cfg['model']['widht'] = 3",
        2,
        r"cfg\.model\.widht: Net takes no 'widht'.\n.*Did you mean 'width'",
    ),
    "an unknown field of the model": (
        "cfg['model']['mapping'] = {'input': 'image'}",
        2,
        r"cfg\.model\.mapping\.input: .*'image'",
    ),
    "an unknown parameter of the model": ("cfg['model']['mapping'] = {'x': 'input'}", 2, r"cfg\.model\.mapping\.x: Net has no"),
    "an unknown field of the loss": (
        "cfg['loss']['mapping'] = {'target': 'label'}",
        2,
        r"cfg\.loss\.mapping\.target: .*'label'",
    ),
    "an unknown field of a metric": (
        "cfg['hooks']['metrics']['top1']['mapping']['label'] = 'class'",
        2,
        r"cfg\.hooks\.metrics\.top1\.mapping\.label: .*'class'",
    ),
    "too many output_keys": (
        "cfg['model']['output_keys'] = ['a', 'b']",
        2,
        r"cfg\.model\.output_keys: 2 names \(a, b\), .* 1 value",
    ),
    "an output that hides a field": ("cfg['model']['output_keys'] = ['target']", 2, "would hide the batch field 'target'"),
    "a loss that is a string": ("cfg['loss'] = dict(type='test_fit.Loud')", 2, "cfg.loss: the criterion returned str"),
    "a loss of shape (B, 3)": (
        "cfg['loss'] = dict(type='test_fit.Wide')",
        2,
        r"cfg\.loss: .* shape \(4, 3\), which is not a scalar",
    ),
    "a model without parameters": (
        "cfg['model'] = dict(type='test_fit.NoParameters')",
        2,
        "cfg.model: there is nothing to train",
    ),
    "a model that cannot be built": (
        "cfg['model'] = dict(type='test_fit.Refuses')",
        2,
        r"cfg\.model: could not be built: KeyError: 'no such backbone'\n  .*test_fit\.py, line \d+",
    ),
    "a model that fails": (
        "cfg['model'] = dict(type='torch.nn.Linear', in_features=5, out_features=3)",
        2,
        r"cfg\.model: failed on the first samples: RuntimeError: (addmm: )?mat1 and mat2",
    ),
    "an empty dataset": ("cfg['data']['train']['n'] = 0", 3, r"cfg\.data\.train: the dataset \(TensorDataset\) is empty"),
    "a dataset without its file": (
        "cfg['data']['val'] = dict(type='test_fit.NoFile', path='nowhere.csv')",
        3,
        r"cfg\.data\.val: .* FileNotFoundError: .*'nowhere.csv'",
    ),
    "a hook that is none": (
        "cfg['hooks']['odd'] = dict(type='test_fit.Broken')",
        2,
        r"cfg\.hooks\.odd: the builder returned int",
    ),
    "a phase twice": ("cfg['workflow'].append({'phase': 'val'})", 2, "cfg.workflow: the phase 'val' is there 2 times"),
    "two hooks of one name": (
        "cfg['hooks'] = [dict(type='EMAHook'), dict(type='EMAHook')]",
        2,
        r"cfg\.hooks\.1: the hook at cfg\.hooks\.0 is called 'ema' too",
    ),
    "two hooks with one slot": (
        "s = dict(type='LrSchedulerHook', scheduler=dict(type='StepLR', step_size=1)); cfg['hooks'] = dict(a=s, b=s)",
        2,
        "two hooks keep state under the name 'lr_scheduler'",
    ),
    "a log item that does not exist": (
        "cfg['hooks']['logger'] = dict(type='LoggerHook', log_items={'top1': \"meters['top2'].avg\"})",
        2,
        r"cfg\.hooks\.logger\.log_items\.top1: .* does not exist in this run\. Did you mean 'meters\.top1\.avg'",
    ),
    "a metric of a reserved name": (
        "cfg['hooks']['metrics']['epoch'] = cfg['hooks']['metrics'].pop('top1')",
        2,
        "the key 'epoch' of metrics.jsonl is reserved",
    ),
    "samples without a tensor": (
        "cfg['data']['train'] = dict(type='test_fit.Texts')",
        2,
        r"cfg\.data\.train: no field of the batch is a tensor with one row per sample\. Fields: text, more\.\n  A sample needs",
    ),
    "a list of optimizers": (
        "cfg['optimizer'] = [dict(type='SGD', lr=0.1), dict(type='Adam')]",
        2,
        r"cfg\.optimizer: 2 optimizers, and a cfg has one\. Compose several optimizers in Python.*\n.*README",
    ),
    "optimizers by name": (
        "cfg['optimizer'] = dict(G=dict(type='Adam'), D=dict(type='Adam'))",
        2,
        r"^ConfigError: cfg\.optimizer: 2 optimizers, .*\n.*'In Python, and several optimizers'[^\n]*\n$",
    ),
    "an optimizer that is text": ("cfg['optimizer'] = 'SGD'", 2, r"cfg\.optimizer: expected dict\[str, Any\] \| None, got str"),
    "a retention of one": (
        "cfg['hooks']['save'] = dict(type='CheckpointHook', keep=dict(last=1))",
        2,
        r"^ConfigError: cfg\.hooks\.save\.keep\.last: at least 2, got 1: ",
    ),
    "a misspelt retention": (
        "cfg['hooks']['save'] = dict(type='CheckpointHook', keep=dict(lst=3))",
        2,
        r"cfg\.hooks\.save\.keep\.lst: keep takes no 'lst'\.\n  Did you mean 'last'",
    ),
    "a collate function that refuses its arguments": (
        "cfg['data']['val_dataloader']['collate_fn'] = dict(type='PadCollate', max_size={'input': 0})",
        2,
        r"^ConfigError: cfg\.data\.val_dataloader\.collate_fn\.max_size\.input: expected sizes of at least 1, got 0",
    ),
    "a sampler without its numbers": (
        "cfg['data']['train_dataloader']['sampler'] = dict(type='LengthSampler')",
        3,
        r"^DataError: cfg\.data\.train_dataloader\.sampler: LengthSampler\.lengths: TensorDataset has no 'lengths'",
    ),
    "a schedule that refuses its arguments": (
        "cfg['hooks']['rate'] = dict(type='LrSchedulerHook', scheduler=dict(type='StepLR', step_size='x', gamma=0.1))",
        2,
        r"^ConfigError: cfg\.hooks\.rate\.scheduler",
    ),
    "no data for a phase": ("cfg['data']['val'] = None", 2, "the phase 'val' needs cfg.data.val"),
    "a missing loss": ("cfg['loss'] = None", 2, "the phase 'train' needs cfg.loss"),
}


def told(argv: list[str], capsys: Cap) -> tuple[int, str]:
    """Exit code and stderr of the command line, which must not show a traceback."""
    code = main(argv)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return code, message


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_message_and_its_exit_code_and_harms_nothing(what: str, tmp_path: Path, capsys: Cap) -> None:
    """Whatever is wrong is said in at most 4 lines with its cfg path; no byte of an existing work_dir changes; in 5 s."""
    line, expected, pattern = BAD[what]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step":1}\n')
    (run / "config.json").write_text("{}\n")
    argv = [cfg_file(tmp_path, line)]
    before, start = files_of(run), time.monotonic()
    code, message = told(argv, capsys)
    assert time.monotonic() - start < 5
    assert code == expected
    assert re.search(pattern, message), message
    assert message.count("\n") <= 4 and message.startswith(("ConfigError: ", "DataError: "))
    assert files_of(run) == before


def test_several_mistakes_are_told_at_once(tmp_path: Path, capsys: Cap) -> None:
    """Everything that can be seen without building is in one message."""
    lines = ["cfg['sead'] = 1", "cfg['model']['widht'] = 3", "cfg['loss']['type'] = 'CrossLoss'", "cfg['total_epochs'] = 0"]
    code, message = told([cfg_file(tmp_path, *lines), "hooks.metrics.top1.topk='x'"], capsys)
    assert code == 2 and not (tmp_path / "run").exists()
    for path in ("cfg.sead", "cfg.model.widht", "cfg.loss.type", "cfg.total_epochs", "cfg.hooks.metrics.top1.topk"):
        assert f"{path}: " in message


def test_mistakes_found_while_building_are_told_at_once(tmp_path: Path, capsys: Cap) -> None:
    """Data sets of all phases, model, loss, optimizer and loaders are each tried; so are hooks, and then streams, by themselves."""
    lines = [
        "cfg['data']['train'] = cfg['data']['val'] = dict(type='test_fit.NoFile', path='nowhere.csv')",
        "cfg['model'], cfg['loss'] = dict(type='test_fit.Refuses'), dict(type='test_fit.Unlucky')",
        "cfg['optimizer'] = dict(type='SGD', lr=-1.0)",
        "cfg['data']['val_dataloader']['collate_fn'] = dict(type='PadCollate', multiple_of=0)",
    ]
    code, message = told([cfg_file(tmp_path, *lines)], capsys)
    assert code == 2 and message.startswith("ConfigError: ")
    said = (
        "data.train: ",
        "data.val: ",
        "model: ",
        "loss: ",
        "optimizer: SGD refuses",
        "data.val_dataloader.collate_fn.multiple_of",
    )
    for path in said:
        assert len(re.findall(rf"^(?:ConfigError: )?cfg\.{path}", message, re.MULTILINE)) == 1, message
    code, message = told([cfg_file(tmp_path, lines[0])], capsys)
    assert code == 3 and message.startswith("DataError: cfg.data.train: ") and "\ncfg.data.val: " in message
    code, message = told([cfg_file(tmp_path, "cfg['data']['train']['n'] = cfg['data']['val']['n'] = 0")], capsys)
    assert code == 3 and "cfg.data.train: the dataset" in message
    hooks = "a=dict(type='test_fit.Broken'), b=dict(type='CheckpointHook', interval=0), c=dict(type='test_fit.Broken')"
    code, message = told([cfg_file(tmp_path, hooks=hooks)], capsys)
    assert code == 2 and all(f"cfg.hooks.{n}: " in message for n in "abc")
    assert not (tmp_path / "run").exists()


def test_a_file_to_resume_from_is_called_what_it_is(tmp_path: Path, capsys: Cap) -> None:
    """A state dict, any other file and a checkpoint's own file are refused with what would do, before anything is written."""
    fit(tiny_cfg(tmp_path / "first", checkpoint=dict(type="CheckpointHook")))
    own = tmp_path / "first" / "checkpoints" / "step_00000015" / "state.pt"
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "text.pth").write_text("no archive")
    hooks = "resume=dict(type='ResumeHook', resume_from={!r})"
    for file, pattern in (
        (
            tmp_path / "weights.pth",
            r"weights\.pth is a state dict of 2 tensors, and no folder of checkpoints.*\n.*cfg\.model\.init=dict\(from_=",
        ),
        (tmp_path / "text.pth", r"text\.pth is a file, and no folder of checkpoints"),
        (own, r"state\.pt is a file of a checkpoint; give its folder, .*step_00000015\.\n"),
    ):
        code, message = told([cfg_file(tmp_path, hooks=hooks.format(str(file)))], capsys)
        assert code == 2 and re.match(r"ConfigError: cfg\.hooks\.resume\.resume_from: .*" + pattern, message), message
    line = f"cfg['resume_from'] = {str(tmp_path / 'weights.pth')!r}"
    code, message = told([cfg_file(tmp_path, line, hooks="resume=dict(type='ResumeHook')")], capsys)
    assert code == 2 and message.startswith("ConfigError: cfg.resume_from: ")
    assert not (tmp_path / "run").exists()


def test_class_weights_on_the_command_line_train_and_are_recorded(tmp_path: Path) -> None:
    """Numbers for a tensor train what the tensor trains, and config.json has the numbers in both cases."""
    found = []
    for name, given in (("line", [1, 2.5, 0.5]), ("tensor", torch.tensor([1, 2.5, 0.5]))):
        cfg = tiny_cfg(tmp_path / name) | {"loss": dict(type="CrossEntropyLoss", weight=given)}
        found.append(fit(cfg).metrics)
        assert json.loads((tmp_path / name / "config.json").read_text())["loss"]["weight"] == [1, 2.5, 0.5]
    assert main([cfg_file(tmp_path), "loss.weight=[1, 2.5, 0.5]"]) == 0
    assert found[0] == found[1] != fit(tiny_cfg(tmp_path / "plain")).metrics
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "line")


def test_the_command_line_itself_can_be_wrong(tmp_path: Path, capsys: Cap) -> None:
    """A missing file, a malformed override and an unknown option exit with 2 and say what would do."""
    file = cfg_file(tmp_path)
    code, message = told([str(tmp_path / "tiny_epx.py")], capsys)
    assert code == 2 and "there is no cfg file" in message and "Did you mean 'tiny_exp.py'" in message
    code, message = told([file, "optimizer.lr"], capsys)
    assert code == 2 and "override 'optimizer.lr': write key=value" in message
    code, message = told([file, "optimiser.lr=1"], capsys)
    assert code == 2 and "cfg has no 'optimiser'. Did you mean 'optimizer'" in message
    for argv in ([], [file, "--fast"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """With --debug an error comes with where it was raised."""
    with pytest.raises(ConfigError, match="nothing to train"):
        main([cfg_file(tmp_path, BAD["a model without parameters"][0]), "--debug"])


def test_a_file_in_the_place_of_the_work_dir_is_left_alone(tmp_path: Path, capsys: Cap) -> None:
    """A work_dir that cannot be made is a storage error, 5."""
    (tmp_path / "run").write_text("mine")
    code, message = told([cfg_file(tmp_path)], capsys)
    assert code == 5 and "cannot be used as a work_dir: File exists" in message and message.count("\n") == 1
    assert (tmp_path / "run").read_text() == "mine"


def test_a_work_dir_in_use_is_refused(tmp_path: Path, capsys: Cap) -> None:
    """The second run gets 6 and the process that holds the folder, and changes nothing; the first one is not disturbed."""
    argv = [cfg_file(tmp_path, hooks=f"die=dict(type=Die, step=7, by={int(signal.SIGSTOP)})")]
    first = launch(argv, tmp_path / "log")
    try:
        _, status = _stopped(first.pid, tmp_path)
        assert status
        before = files_of(tmp_path / "run")
        code, message = told(argv, capsys)
        assert code == 6 and f"in use by process {first.pid}" in message and message.count("\n") == 1
        assert files_of(tmp_path / "run") == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(30)
    assert first.exitcode == 0


def _stopped(pid: int, folder: Path) -> tuple[float, bool]:
    """Wait until the process has stopped itself."""
    for _ in range(1500):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return time.monotonic(), True
        time.sleep(0.02)
    return time.monotonic(), False


def test_a_nan_loss_ends_the_run_with_4(tmp_path: Path, capsys: Cap) -> None:
    """A loss that is not finite is found at the latest at the end of the epoch; what was saved before stays."""
    argv = [cfg_file(tmp_path, hooks="checkpoint=dict(type='CheckpointHook')")]
    code, message = told([*argv, "optimizer.lr=1e30", "optimizer.type=SGD"], capsys)
    assert code == 4 and re.search(r"NonFiniteError: the train loss of epoch \d is (nan|inf) at step \d+\.\n", message)
    assert message.count("\n") == 2
    assert rows_of(tmp_path / "run")[-1]["loss"] in ("nan", "inf")


def test_a_user_error_while_training_keeps_its_traceback(tmp_path: Path) -> None:
    """What user code raises in mid-run is no mistake of the cfg: it passes through (exit code 1)."""

    def later(*, name: str) -> Any:
        from ailab.stack import Middleware

        def wrap(step: Any) -> Any:
            def failing(state: Any, batch: Any) -> Any:
                if state.at == 3:
                    raise KeyError("mine")
                return step(state, batch)

            return failing

        return Middleware(name, wrap, "host")

    with pytest.raises(KeyError, match="mine"):
        fit(tiny_cfg(tmp_path / "run", later=dict(type=later)))
    assert ended([cfg_file(tmp_path, "cfg['hooks']['late'] = dict(type='test_fit.Late')")], tmp_path / "log") == 1
    assert "KeyError: 'mine'" in (tmp_path / "log").read_text()


def Late(*, name: str) -> Any:
    from ailab.stack import Middleware

    def wrap(step: Any) -> Any:
        def failing(state: Any, batch: Any) -> Any:
            raise KeyError("mine")

        return failing

    return Middleware(name, wrap, "host")


def test_peers_that_do_not_come_are_exit_code_7(tmp_path: Path, capsys: Cap, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that does not form within dist.timeout_s ends the run with 7 and writes nothing."""
    for key, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(key, str(value))
    code, message = told([cfg_file(tmp_path, "cfg['dist'] = dict(timeout_s=1)")], capsys)
    assert code == 7 and "PeerError: rank 1 of 2 could not connect to the other ranks at env://" in message
    assert not (tmp_path / "run").exists()


def test_sigterm_in_mid_epoch_saves_the_state_and_exits_with_143(tmp_path: Path) -> None:
    """A pre-empted run says so, has saved the step it was at, and goes on from there to the same end."""
    saving = "checkpoint=dict(type='CheckpointHook'), resume=dict(type='ResumeHook')"
    argv = [cfg_file(tmp_path, hooks=f"{saving}, die=dict(type=Die, step=8, by={int(signal.SIGTERM)})")]
    assert ended(argv, tmp_path / "log") == 143
    assert "Preempted: stopped by a signal at step 8; the state is saved in" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert int(newest_content(tmp_path / "run")["step"]) == 8
    assert ended(argv, tmp_path / "log") == 0
    assert rows_of(tmp_path / "run")[-1]["step"] == 15
    (tmp_path / "whole").mkdir()
    assert ended([cfg_file(tmp_path / "whole")], tmp_path / "log") == 0  # in a process like theirs: bits depend on the threads
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole" / "run")


def test_sigterm_without_a_checkpoint_hook_says_that_nothing_is_saved(tmp_path: Path) -> None:
    """The exit code is 143 all the same."""
    argv = [cfg_file(tmp_path, hooks=f"die=dict(type=Die, step=3, by={int(signal.SIGTERM)})")]
    assert ended(argv, tmp_path / "log") == 143
    assert "there is no CheckpointHook, nothing is saved" in (tmp_path / "log").read_text()


def test_it_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """`python -m ailab.fit` with nothing installed: reports at both ends on stdout, nothing on stderr, exit code 0."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ailab.fit", cfg_file(tmp_path), "total_epochs=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "Net:", "83", "parameters,", "83", "trained"]
    assert lines[1].endswith("train 50 samples in 5 steps of 11, val 20 samples in 3 steps of 8")
    assert lines[2].startswith("device    cpu") or "cuda" in lines[2].lower() or "NVIDIA" in lines[2]
    assert "float32" in lines[2] and lines[3] == "compile   no (compile=False)" and lines[4].endswith(str(tmp_path / "run"))
    assert re.fullmatch(r"epoch 1/2  train  loss \d\.\d{4}  top1 0\.\d{4}  lr 0\.0100  [\d,]+ samples/s", lines[5])
    assert re.fullmatch(r"epoch 2/2  val    loss \d\.\d{4}  top1 0\.\d{4}  lr 0\.0100", lines[8])
    assert lines[9] == "done" and re.match(r"  val_top1 +last 0\.\d{4}   best 0\.\d{4} \(epoch [12]\)", lines[13])
    assert lines[14].endswith(": config.json, metrics.jsonl, train.log")
    code = subprocess.run([*command, "totl=1"], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert code.returncode == 2 and code.stderr.startswith("ConfigError: cfg.totl: ")


# What a finished run leaves.


def test_the_record_has_every_result_under_its_name(tmp_path: Path) -> None:
    """metrics.jsonl: step, epoch, phase, loss, each metric by its cfg name, and the clock only in keys that say so."""
    cfg = tiny_cfg(tmp_path / "run")
    cfg["hooks"]["metrics"]["best"] = {**cfg["hooks"]["metrics"]["top1"], "phases": ["val"]}
    result = fit(cfg)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    common = {"step", "epoch", "phase", "final", "loss", "top1", "lr"}
    for i, row in enumerate(rows):
        phase = ("train", "val")[i % 2]
        assert {k for k in row if not k.startswith("wall_")} == (common if phase == "train" else common | {"best"})
        assert (row["step"], row["epoch"], row["phase"], row["final"]) == (5 * (i // 2 + 1), i // 2 + 1, phase, True)
        assert row["lr"] == [0.01] and 0 < row["wall_seconds"] < 60
    assert len(rows) == 6
    assert result.metrics == {f"{row['phase']}_{n}": row[n] for row in rows[-2:] for n in ("loss", "top1", "best") if n in row}
    assert rows[-1]["best"] == rows[-1]["top1"]


def test_only_what_has_a_direction_has_a_best(tmp_path: Path, capsys: Cap) -> None:
    """The report at the end calls the lowest loss and the highest accuracy best; of what says nothing it has the last value."""
    from test_metric_hook import Count

    cfg = tiny_cfg(tmp_path / "run")
    cfg["hooks"]["metrics"]["mine"] = dict(type=Count, mapping={"pred": "output", "label": "target"}, phases=["val"])
    fit(cfg)
    told = {line.split()[0]: line for line in capsys.readouterr().out.partition("\ndone\n")[2].splitlines()}
    rows = [r for r in rows_of(tmp_path / "run") if r["phase"] == "val"]
    for name, pick in (("loss", min), ("top1", max), ("mine_share", max)):
        assert f"best {pick(r[name] for r in rows):.4f} (epoch" in told[f"val_{name}"]
    assert told["val_mine_samples"].split() == ["val_mine_samples", "last", "20.0000"]


def test_the_record_has_running_means_in_between(tmp_path: Path) -> None:
    """Every 50 steps a line that is not final has the mean over the epoch so far."""
    cfg = tiny_cfg(tmp_path / "run") | {"total_epochs": 2}
    cfg["data"]["train_dataloader"]["batch_size"] = 1
    cfg["data"]["train"]["n"] = 60
    cfg["model"] = dict(type="torch.nn.Linear", in_features=4, out_features=3)
    fit(cfg)
    rows = [r for r in rows_of(tmp_path / "run") if r["phase"] == "train"]
    assert [(r["step"], r["epoch"], r["final"]) for r in rows] == [
        (50, 1, False),
        (60, 1, True),
        (100, 2, False),
        (120, 2, True),
    ]
    assert all(0 <= r["top1"] <= 1 and r["top1"] * (r["step"] - 60 * (r["epoch"] - 1)) % 1 < 1e-6 for r in rows)


def test_the_cfg_is_written_down_and_not_changed(tmp_path: Path) -> None:
    """config.json holds the completed cfg; the caller's own dict stays as it was; a second run in a process is the same run."""
    cfg = tiny_cfg(tmp_path / "run", ema=dict(type="EMAHook", decay=0.5))
    before = copy.deepcopy(cfg)
    first = fit(cfg)
    assert cfg == before
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        written["optimizer"]["lr"] == 0.01
        and written["model"]["type"] == "tiny.Net"
        and written["hooks"]["ema"]["enable"] is True
    )
    assert written["data"]["train_dataloader"]["num_workers"] == 0
    rows, first_files = rows_of(tmp_path / "run"), files_of(tmp_path / "run")
    second = fit(cfg)
    assert second.metrics == first.metrics and rows_of(tmp_path / "run") == rows
    assert files_of(tmp_path / "run").keys() == first_files.keys()


def test_overrides_reach_the_run(tmp_path: Path) -> None:
    """`a.b.c=value` changes the cfg, whatever stands between; `iters` limits a phase."""
    argv = [
        cfg_file(tmp_path, hooks="ema=dict(type='EMAHook')"),
        "optimizer.lr=0.25",
        "workflow.0.iters=2",
        "hooks.ema.enable=False",
    ]
    assert main([*argv, "--debug", "total_epochs=2", f"work_dir={tmp_path / 'other'}"]) == 0
    rows = rows_of(tmp_path / "other")
    assert [(r["step"], r["phase"]) for r in rows] == [(2, "train"), (2, "val"), (4, "train"), (4, "val")]
    assert rows[0]["lr"] == [0.25] and not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "other" / "config.json").read_text())["hooks"]["ema"]["enable"] is False


def test_iters_beyond_the_data_go_on_with_it(tmp_path: Path) -> None:
    """A phase of more steps than an epoch of the data has takes the data again."""
    cfg = tiny_cfg(tmp_path / "run") | {"workflow": [{"phase": "train", "iters": 12}], "total_epochs": 2}
    fit(cfg)
    assert [r["step"] for r in rows_of(tmp_path / "run")] == [12, 24]


def test_show_prints_each_hook_at_its_depth_in_order(tmp_path: Path, capsys: Cap) -> None:
    """Outermost first, so a hook stands before those that are listed before it; nothing is written."""
    hooks = (
        "accumulate=dict(type='GradAccumulateHook', n=2), clip=dict(type='GradClipHook', max_norm=1.0),"
        "ema=dict(type='EMAHook'),"
        "amp=dict(type='AMPHook', dtype='bf16'), checkpoint=dict(type='CheckpointHook', every_steps=2),"
        "resume=dict(type='ResumeHook'), logger=dict(type='LoggerHook'), tensorboard=dict(type='TensorboardHook')"
    )
    line = "cfg['workflow'][1]['amp'] = cfg['workflow'][1]['ema'] = {'enable': False}"
    assert main([cfg_file(tmp_path, line, hooks=hooks), "--show"]) == 0
    out = capsys.readouterr().out.splitlines()
    shown = {row[:7].strip(): row[7:].strip().split("  ")[0] for row in out}
    assert list(shown) == ["depth", "run", "epoch", "fold", "host", "line", "step", "grad", "loss", "core"]
    assert shown["run"] == "tensorboard, logger, resume, checkpoint, record"
    assert shown["epoch"] == "all: tensorboard, logger, checkpoint, record"
    assert shown["host"] == "train: tensorboard, logger, checkpoint, record"
    assert shown["step"] == "train: ema" and shown["grad"] == "train: clip, accumulate"
    assert shown["loss"] == "train: amp, top1; val: top1"
    assert "eager (compile=False)" in shown["line"] and shown["core"].startswith("Net: 6 parameter tensors")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Cap) -> None:
    """It builds everything, steps through each phase, and reports time and memory."""
    hooks = "checkpoint=dict(type='CheckpointHook'), ema=dict(type='EMAHook'), tensorboard=dict(type='TensorboardHook')"
    file = cfg_file(tmp_path, hooks=hooks)
    before = files_of(tmp_path)
    assert main(["--dry-run", file, "total_epochs=9"]) == 0
    out = capsys.readouterr().out
    for phase in ("train", "val"):
        assert re.search(rf"^{phase} +first step [\d.]+ s, second [\d.]+ ms, loss [\d.]+, top1 [\d.]+$", out, re.MULTILINE)
    assert re.search(r"^memory state [\d.]+ MiB, peak \d+ MiB", out, re.MULTILINE)
    assert {p: c for p, c in files_of(tmp_path).items() if "__pycache__" not in p} == before


def test_a_phase_can_switch_a_hook_off(tmp_path: Path) -> None:
    """Without the average in `val` the results are those of the parameters; training is the same."""
    with_average = fit(tiny_cfg(tmp_path / "a", ema=dict(type="EMAHook", decay=0.9)))
    without = tiny_cfg(tmp_path / "b", ema=dict(type="EMAHook", decay=0.9))
    without["workflow"][1]["ema"] = {"enable": False}
    switched, plain = fit(without), fit(tiny_cfg(tmp_path / "c"))
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "c") and plain.metrics == switched.metrics
    assert switched.metrics["val_loss"] != with_average.metrics["val_loss"]
    assert switched.metrics["train_loss"] == with_average.metrics["train_loss"]


def test_an_observer_can_be_switched_off_for_a_phase(tmp_path: Path) -> None:
    """The log has no line of that phase, and all lines of the others, whichever phase comes first."""
    for off, phases in ((0, ["val"]), (1, ["train"])):
        cfg = tiny_cfg(tmp_path / str(off), logger=dict(type="LoggerHook", interval=2))
        cfg["workflow"][off]["logger"] = {"enable": False}
        fit(cfg)
        lines = epochs_of(tmp_path / str(off) / "train.log")
        assert sorted({line.split()[2] for line in lines}) == phases
        assert len(lines) == (3 if phases == ["val"] else 10)
        assert len(rows_of(tmp_path / str(off))) == 6


def test_the_log_is_the_console(tmp_path: Path, capsys: Cap, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.log has every line of the console: the report at the start, the warnings before it and after, the results."""
    cfg = tiny_cfg(tmp_path / "run", metric=dict(type="LoggerHook", log_items={"broken": lambda report: 1 / 0}))
    monkeypatch.setattr("ailab.job.session.little_memory", lambda kind: "little memory")
    fit(cfg)
    printed, logged = capsys.readouterr().out, (tmp_path / "run" / "train.log").read_text()
    first = logged.splitlines()
    assert [line.split()[0] for line in first[:6]] == ["warning:", "model", "data", "device", "compile", "work_dir"]
    assert logged.count("warning: hook 'metric' failed: ZeroDivisionError") == 3
    assert logged == printed


def test_log_items_read_the_run_by_path_or_by_call(tmp_path: Path, capsys: Cap) -> None:
    """A path, a callable, and a result that does not exist yet; one that fails is reported and ends nothing."""
    items: dict[str, Any] = {
        "rate": "optimizer.param_groups.0.lr",
        "avg": "meters['top1'].avg",
        "val": "metric_results.val_top1",
        "double": lambda report: float(2 * report.step),
    }
    fit(tiny_cfg(tmp_path / "run", logger=dict(type="LoggerHook", interval=5, log_dir=str(tmp_path / "logs"), log_items=items)))
    lines = epochs_of(tmp_path / "logs" / "train.log")
    rows = rows_of(tmp_path / "run")
    assert "rate 0.0100" in lines[0] and "double 10.0000" in lines[0] and "val 0" not in lines[0]
    assert f"avg {rows[0]['top1']:.4f}" in lines[1]
    assert f"val {rows[1]['top1']:.4f}" in lines[3] and "epoch 2/3" in lines[3]

    def broken(report: Report) -> float:
        raise ZeroDivisionError

    capsys.readouterr()
    fit(tiny_cfg(tmp_path / "run2", logger=dict(type="LoggerHook", log_items={"broken": broken})))
    out = capsys.readouterr().out
    assert out.count("warning: hook 'logger' failed: ZeroDivisionError") == 3 and "it is switched off now" in out


# Workflows that do not train.


@pytest.mark.parametrize("phase", ["val", "test"])
def test_a_workflow_that_only_evaluates_needs_no_optimizer(phase: str, tmp_path: Path) -> None:
    """It runs once, reports its phase at step 0 of epoch 0, and without a loss reports the metrics alone."""
    cfg = tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook"), ema=dict(type="EMAHook"))
    cfg["data"]["test"] = cfg["data"]["val"]
    del cfg["optimizer"]
    result = fit(cfg | {"workflow": [{"phase": phase}]})
    (row,) = rows_of(tmp_path / "run")
    assert (row["step"], row["epoch"], row["phase"]) == (0, 0, phase) and row["lr"] == []
    assert result.metrics == {f"{phase}_loss": row["loss"], f"{phase}_top1": row["top1"]}
    assert not (tmp_path / "run" / "checkpoints").exists()
    del cfg["loss"]
    unscored = fit(cfg | {"workflow": [{"phase": phase}], "work_dir": str(tmp_path / "unscored")})
    assert unscored.metrics == {f"{phase}_top1": row["top1"]}


def _evaluated(cfg: dict[str, Any], **changes: Any) -> Callable[[], dict[str, float]]:
    return lambda: fit(cfg | {"workflow": [{"phase": "test"}], **changes}).metrics


def test_a_finished_run_can_be_tested_in_its_own_folder(tmp_path: Path) -> None:
    """The same cfg with a `test` phase alone reads the newest checkpoint, adds its line, and leaves the rest as it is."""
    schedule = dict(type="LrSchedulerHook", scheduler=dict(type="WarmupAndCosineAnnealingLR", warmup_steps=2), by="step")
    hooks = dict(
        ema=dict(type="EMAHook", decay=0.9),
        lr_scheduler=schedule,
        checkpoint=dict(type="CheckpointHook"),
        resume=dict(type="ResumeHook"),
    )
    cfg = tiny_cfg(tmp_path / "run", **hooks)
    cfg["data"] |= {"test": cfg["data"]["val"], "test_dataloader": cfg["data"]["val_dataloader"]}
    trained = fit(cfg).metrics
    before = files_of(tmp_path / "run")
    tested = _evaluated(cfg)()
    assert tested == {"test_loss": trained["val_loss"], "test_top1": trained["val_top1"]}
    after = files_of(tmp_path / "run")
    assert {p for p in after if after[p] != before.get(p)} == {"metrics.jsonl", "train.log"}
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert (rows_of(tmp_path / "run")[-1]["step"], rows_of(tmp_path / "run")[-1]["epoch"]) == (15, 3)  # those of the model
    plain = _evaluated(cfg, work_dir=str(tmp_path / "plain"), hooks={**cfg["hooks"], "ema": {**hooks["ema"], "enable": False}})
    cfg["hooks"]["resume"]["resume_from"] = str(tmp_path / "run" / "checkpoints" / "step_00000010")
    earlier = _evaluated(cfg, work_dir=str(tmp_path / "earlier"))()
    (row,) = (r for r in rows_of(tmp_path / "run") if r["phase"] == "val" and r["step"] == 10)
    assert [(r["step"], r["epoch"]) for r in rows_of(tmp_path / "earlier")] == [(10, 2)]
    assert earlier == {"test_loss": row["loss"], "test_top1": row["top1"]}
    assert plain() != tested


def test_an_evaluation_refuses_a_checkpoint_that_does_not_fit(tmp_path: Path, capsys: Cap) -> None:
    """Another model is exit code 5 and says what differs; a hook that reads what was never saved is one too."""
    cfg = tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook"))
    fit(cfg)
    source = str(tmp_path / "run" / "checkpoints")
    lines = ["cfg['workflow'] = [{'phase': 'val'}]", "cfg['model']['width'] = 9", "cfg['work_dir'] += '2'"]
    code, message = told([cfg_file(tmp_path, *lines, hooks=f"resume=dict(type='ResumeHook', resume_from={source!r})")], capsys)
    assert code == 5 and "cfg.model, parameter first.weight: checkpoint has float32 (8, 4), run has float32 (9, 4)" in message
    hooks = f"ema=dict(type='EMAHook'), resume=dict(type='ResumeHook', resume_from={source!r})"
    code, message = told([cfg_file(tmp_path, lines[0], lines[2], hooks=hooks)], capsys)
    assert code == 5 and "cfg.hooks.ema, its memory first.weight: checkpoint has nothing" in message
