"""`python -m ailab.evaluate`: the results that the run itself reported, with intervals, and nothing else of the run changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import TOP1, ScalarLoss, config
from tiny import cfg_file, files_of, rows_of, tiny_cfg
from torch import Tensor
from torch.nn.functional import cross_entropy

from ailab.evaluate import evaluate, main
from ailab.fit import fit
from ailab.types import Mean

SAVED = dict(type="CheckpointHook", keep=dict(best=1, metric="val_top1"))
KEEP = "checkpoint=dict(type='CheckpointHook', keep=dict(best=1, metric='val_top1')), ema=dict(type='EMAHook', decay=0.9)"


def logged(work_dir: Path, step: int) -> dict[str, float]:
    """The val results of the epoch that ended at a step, from metrics.jsonl."""
    [row] = [r for r in rows_of(work_dir) if r["phase"] == "val" and r["final"] and r["step"] == step]
    return {n: v for n, v in row.items() if n not in ("step", "epoch", "phase", "final", "lr")}


def quiet(line: str) -> None:
    pass


def Heart(*, run: Any) -> Any:
    from ailab.stack import Middleware

    def wrap(step: Any) -> Any:
        def beating(state: Any, batch: Any) -> Any:
            (run.work_dir / "heartbeat").touch()
            return step(state, batch)

        return beating

    return Middleware("heart", wrap, "host", phases=("val",))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    cfg = tiny_cfg(folder, ema=dict(type="EMAHook", decay=0.9), checkpoint=SAVED, heart=dict(type=Heart, enable=False))
    fit(cfg)
    return cfg, folder


@pytest.mark.parametrize("which", ["last", "best"])
def test_evaluate_gives_what_the_run_has_logged(run: tuple[dict[str, Any], Path], which: str) -> None:
    """The results of a checkpoint equal those of its epoch in metrics.jsonl, in every bit; the average of an EMAHook counts."""
    cfg, folder = run
    found = evaluate(cfg, which, say=quiet)
    assert {n: e.value for n, e in found.results.items()} == logged(folder, found.step)
    assert found.samples == 20
    assert [e.better for e in found.results.values()] == ["min", "max"]
    if which == "best":
        assert found.checkpoint == json.loads((folder / "checkpoints" / "best.json").read_text())["path"]


def test_evaluate_changes_nothing_of_the_run(run: tuple[dict[str, Any], Path]) -> None:
    """Every file of the work_dir keeps its bytes, beside its own folder; a user's observer takes no part."""
    cfg, folder = run
    before = {n: b for n, b in files_of(folder).items() if not n.startswith("evaluate")}
    hooks = {**cfg["hooks"], "heart": dict(type=Heart), "board": dict(type="TensorboardHook")}
    evaluate({**cfg, "hooks": hooks}, "last", say=quiet)
    assert {n: b for n, b in files_of(folder).items() if not n.startswith("evaluate")} == before
    assert sorted(p.name for p in (folder / "evaluate" / "val").iterdir()) == [
        "confusion.png",
        "precision_recall.png",
        "reliability.png",
        "results.json",
    ]


def test_the_training_split_is_evaluated_and_not_trained(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """`split="train"` gives the loss of the saved average over all samples of the training set, each once."""
    cfg, _ = run
    found = evaluate(cfg, "last", "train", out=tmp_path / "out", say=quiet)
    from tiny import Net, Points, newest_content

    net = Net().eval()
    net.load_state_dict(newest_content(Path(cfg["work_dir"]))["model_state"])
    x, y = Points().tensors
    with torch.no_grad():
        scores = net(x)
    assert found.samples == 50
    assert found.results["loss"].value == pytest.approx(float(cross_entropy(scores, y)), rel=1e-6)
    assert found.results["top1"].value == pytest.approx(float((scores.argmax(1) == y).double().mean()))
    assert (tmp_path / "out" / "results.json").exists()


def HalfMean(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Mean:
    """A metric with weights of its own: samples of class 0 count half."""
    own = torch.where(target == 0, 0.5, 1.0)
    return Mean.of((output.argmax(1) == target).float(), own if weight is None else own * weight)


def test_intervals_are_those_of_the_samples(tmp_path: Path) -> None:
    """The interval of each mean equals the bootstrap of per-sample values that are computed outside, with class weights too."""
    from tiny import Net, Points, newest_content

    from ailab.metrics.interval import bootstrap_intervals

    more = dict(type="MetricHook", half=dict(type=HalfMean))
    cfg = tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook"), more=more)
    cfg["loss"] = dict(type="CrossEntropyLoss", weight=[1.0, 2.0, 0.5])
    fit(cfg)
    found = evaluate(cfg, "last", say=quiet)
    net = Net().eval()
    net.load_state_dict(newest_content(tmp_path / "run")["model_state"])
    x, y = Points(20, 1).tensors
    with torch.no_grad():
        scores = net(x)
    each = torch.tensor([1.0, 2.0, 0.5])[y]
    right, own = (scores.argmax(1) == y).double(), torch.where(y == 0, 0.5, 1.0).double()
    values = {"loss": (cross_entropy(scores, y, reduction="none") * each, each), "half": (right * own, own)}
    for name, (total, weight) in values.items():
        rows = torch.stack([total.double(), weight.double()], 1)[:, None]
        [wanted] = bootstrap_intervals(rows, cfg["seed"])
        one = found.results[name]
        assert (one.low, one.high) == pytest.approx(wanted, rel=1e-5)
        assert one.low is not None and one.high is not None and one.low <= one.value <= one.high


def test_a_result_that_is_no_mean_over_samples_has_no_interval(run: tuple[dict[str, Any], Path]) -> None:
    """A scalar loss and a class-style metric have a value and no interval, and a note says which."""
    cfg, _ = run
    iou = dict(type="MeanIoU", num_classes=3, mapping={"pred": "output", "label": "target"})
    hooks = {**cfg["hooks"], "iou": dict(type="MetricHook", iou=iou)}
    found = evaluate({**cfg, "loss": dict(type=ScalarLoss), "hooks": hooks}, "last", say=quiet)
    assert found.results["loss"].low is None and found.results["iou_miou"].low is None
    assert found.results["top1"].low is not None
    assert found.notes == ["no interval of loss, iou_miou, iou_accuracy: it is no mean over samples"]


def test_the_classes_have_rows_and_pictures(run: tuple[dict[str, Any], Path]) -> None:
    """The rows add up to the samples, the matrix to the accuracy, and the pictures are pictures."""
    cfg, folder = run
    found = evaluate(cfg, "last", say=quiet)
    assert found.confusion is not None
    matrix = torch.tensor(found.confusion)
    assert int(matrix.sum()) == 20 and [r["support"] for r in found.classes] == matrix.sum(1).tolist()
    assert float(matrix.diagonal().sum()) / 20 == found.results["top1"].value
    for name in ("confusion", "precision_recall", "reliability"):
        with Image.open(folder / "evaluate" / "val" / f"{name}.png") as image:
            image.load()
            assert image.width > 100


def _evaluated(cfg: dict[str, Any], out: str) -> Any:
    """On a warm rank: a run, and its evaluation without a new process group."""
    from pathlib import Path

    from ailab import dist
    from ailab.config import check
    from ailab.hooks.run.checkpoint import directory_in
    from ailab.job.assemble import assemble
    from ailab.job.evaluation import evaluating, measure
    from ailab.workdir.commit import named

    cpu = torch.device("cpu")
    logs: dict[str, float] = {}

    def extra(run: Any) -> Any:
        from ailab.hooks.observe.log import RecordHook

        return RecordHook(50, run=run)

    full = check.complete(cfg)
    job = assemble(full, cpu, say=quiet, extra=extra)
    job.run(job.state)
    dist.barrier()
    row = [json.loads(line) for line in (Path(cfg["work_dir"]) / "metrics.jsonl").read_text().splitlines()][-1]
    logs = {n: v for n, v in row.items() if n in ("loss", "top1", "ordered")}
    full = check.complete(evaluating(cfg, "val"))
    found = measure(full, cpu, named("last", directory_in(full)), "val", say=quiet)
    return logs, found.logs, found.rows, found.row_names, found.matrix, found.scores


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", ScalarLoss])
def test_two_ranks_evaluate_as_the_run_and_as_one(ranks: Any, tmp_path: Path, loss: Any) -> None:
    """On 2 gloo ranks the results equal the logged ones bitwise; samples come once, in the order of one process."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        cfg = config(loss=loss, epochs=1, hooks=dict(metrics=TOP1, checkpoint=dict(type="CheckpointHook")), sync="graph")
        found[world] = ranks(world)(_evaluated, {**cfg, "work_dir": str(folder)}, str(folder / "out"))
    for logs, values, *_ in found[2]:
        assert values == logs
    (_, one, rows, names, matrix, scores), (_, two, rows2, names2, matrix2, scores2) = found[1][0], found[2][0]
    assert one == pytest.approx(two, rel=1e-9) and names == names2 and len(rows2) == len(rows) == 7
    assert torch.allclose(rows, rows2, rtol=1e-9) and torch.equal(matrix, matrix2)
    assert torch.allclose(scores, scores2, rtol=1e-6)


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, a row per result and per class, the folder; overrides reach the cfg."""
    file = cfg_file(tmp_path, hooks=KEEP)
    from ailab.fit import main as train

    assert train([file]) == 0
    capsys.readouterr()
    assert main([file, "--checkpoint", "last", "data.val_dataloader.batch_size=3"]) == 0
    text = capsys.readouterr().out
    assert "val: 20 samples; step_00000015, 3 epochs done" in text
    assert "95 % interval" in text and "calibration error" in text and "  2  " in text
    assert f"written to {tmp_path / 'run' / 'evaluate' / 'val'}" in text


@pytest.mark.parametrize(
    ("change", "arguments", "code", "words"),
    [
        ("", ["--split", "test"], 2, "cfg.data.test: there is no such split. The cfg has: train, val."),
        ("", ["--checkpoint", "nowhere"], 5, "there is no checkpoint in nowhere"),
        ("", ["--checkpoint", "best"], 5, "has no best.json"),
        ("", ["--resamples", "-1"], 2, "--resamples: at least 0, got -1."),
        ("", ["--checkpoint", "last", "--out", "/dev/null/x"], 2, "Choose another folder: --out."),
        ("cfg['model']['width'] = 9", ["--checkpoint", "last"], 5, "parameter first.weight: checkpoint has float32 (8, 4)"),
    ],
)
def test_what_is_wrong_gets_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, arguments: list[str], code: int, words: str
) -> None:
    """A split that is not there, no checkpoint, another model: the exit code of the kind, a message, and nothing written."""
    fit(tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")))
    capsys.readouterr()
    assert main([cfg_file(tmp_path, change), *arguments]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluate").exists()


def test_best_json_is_read_and_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A best.json that names a path outside is refused."""
    fit(tiny_cfg(tmp_path / "run", checkpoint=SAVED))
    (tmp_path / "run" / "checkpoints" / "best.json").write_text('{"path": "../../other"}')
    assert main([cfg_file(tmp_path)]) == 5
    assert "names '../../other', and no such checkpoint is there" in capsys.readouterr().err


def test_a_bad_sample_does_not_count_and_is_reported(tmp_path: Path) -> None:
    """A sample with a NaN in the split is left out of the results and counted as bad."""
    from tiny import Net

    data = dict(train=dict(type=_Damaged, bad=-1), val=dict(type=_Damaged), val_dataloader=dict(batch_size=4), max_bad_frac=0.5)
    cfg = {**tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")), "data": data, "model": dict(type=Net)}
    cfg["data"]["train_dataloader"] = dict(batch_size=10)
    fit(cfg)
    found = evaluate(cfg, "last", say=quiet)
    assert found.bad == 1 and found.confusion is not None and sum(map(sum, found.confusion)) == 19
    assert {n: e.value for n, e in found.results.items()} == logged(tmp_path / "run", found.step)


class _Damaged:
    def __init__(self, bad: int = 5):
        g = torch.Generator().manual_seed(0)
        self.x, self.y, self.bad = torch.randn(20, 4, generator=g), torch.randint(3, (20,), generator=g), bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.x[index] * (float("nan") if index == self.bad else 1.0), "target": self.y[index]}
