"""`python -m ailab.evaluate cfgs/exp.py --checkpoint best --split val`: exact results of a checkpoint, with intervals."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ailab import dist
from ailab.config.load import load as load_cfg
from ailab.config.schema import PHASES
from ailab.errors import AilabError, ConfigError
from ailab.hooks.run.checkpoint import directory_in
from ailab.hooks.run.resume import from_first
from ailab.job.evaluation import Measured, Split, evaluating, measure, rank_0_says
from ailab.job.session import report_error, started
from ailab.metrics.class_report import (
    Reliability,
    average_precision,
    class_rows,
    precision_recall,
    probabilities,
    reliability,
)
from ailab.metrics.interval import bootstrap_intervals
from ailab.pictures.charts import confusion_image, curves_image, reliability_image
from ailab.workdir import durable
from ailab.workdir.commit import named
from ailab.workdir.manifest import open_folder, read_manifest

FOLDER, RESULTS = "evaluate", "results.json"  # in the work_dir; in the folder of a split
_RESAMPLES = 1000
_MAX_ROWS = 30  # classes that the table lists
_MAX_CURVES = 12  # classes whose curves are drawn: those with the most samples


@dataclass(frozen=True)
class Estimate:
    """One result, with its 95 % bootstrap interval where what each sample adds to it is known."""

    value: float
    low: float | None = None
    high: float | None = None
    better: str | None = None  # "min" or "max"


@dataclass(frozen=True)
class Evaluation:
    """The results of a checkpoint on a split. `results.json` has them by these names."""

    split: str
    checkpoint: str  # the name of its folder
    step: int
    epoch: int
    samples: int
    bad: int  # samples that could not be read and do not count
    results: dict[str, Estimate]
    classes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # a row per class
    confusion: list[list[int]] | None = None  # a row per true class
    calibration_error: float | None = None
    notes: list[str] = field(default_factory=list[str])


def evaluate(
    cfg: Mapping[str, Any],
    checkpoint: str = "best",
    split: Split = "val",
    *,
    out: Path | None = None,
    resamples: int = _RESAMPLES,
    say: Callable[[str], None] = rank_0_says,
) -> Evaluation:
    """Evaluate a checkpoint of the run of a cfg, write `results.json` and pictures, and return the results.

    They are computed by the evaluation step of the run, and are exact for any number of ranks. Of the run nothing is changed.

    Args:
        cfg: of the run, as `fit` takes it.
        checkpoint: "best", "last", or the path of a checkpoint, of a folder of them, or of a work_dir.
        split: "val", "test" or "train".
        out: folder of the files; `work_dir/evaluate/<split>` by default. Files of an earlier evaluation there are replaced.
        resamples: draws of the bootstrap. 0: no intervals.
        say: one line to the console.

    Raises:
        ConfigError: the cfg does not fit, or `out` cannot be written.
        DataError: the split is empty or cannot be read.
        CheckpointError: there is no such checkpoint, or it is of another model.
    """
    return _evaluate(lambda: cfg, checkpoint, split, out, resamples, say)


def _evaluate(
    load: Callable[[], Mapping[str, Any]],
    checkpoint: str,
    split: Split,
    out: Path | None,
    resamples: int,
    say: Callable[[str], None],
) -> Evaluation:
    if resamples < 0:
        raise ConfigError(f"--resamples: at least 0, got {resamples}.")
    with started(lambda: evaluating(load(), split)) as (full, device, warnings):
        for line in warnings:
            say(f"warning: {line}")
        path = Path(from_first(device, lambda: str(named(checkpoint, directory_in(full), say))))
        found = measure(full, device, path, split, values=resamples > 0, say=say)
        report = _report(found, path, split, resamples, full["seed"])
        if dist.rank() == 0:
            folder = out or Path(full["work_dir"]) / FOLDER / split
            _write(folder, report, found)
            say(f"{table(report)}\nwritten to {folder}")
        return report


def _report(found: Measured, path: Path, split: str, resamples: int, seed: int) -> Evaluation:
    with open_folder(path) as folder:
        saved = read_manifest(path, folder)
    intervals = bootstrap_intervals(found.rows, seed, resamples=resamples) if len(found.rows) and found.row_names else []
    near = dict(zip(found.row_names, intervals, strict=True)) if intervals else {}
    results = {n: Estimate(v, *near.get(n, (None, None)), found.directions.get(n)) for n, v in found.logs.items()}
    without = [n for n in results if n not in near]
    notes = [f"no intervals: the loss or a metric cannot be asked sample by sample: {found.failure}"] if found.failure else []
    if without and resamples and not notes:
        notes = [f"no interval of {', '.join(without)}: it is no mean over samples"]
    rows, confusion, error = _by_class(found)
    return Evaluation(
        split, path.name, saved.step, saved.epoch, found.samples, found.bad, results, rows, confusion, error, notes
    )


def _by_class(found: Measured) -> tuple[list[dict[str, Any]], list[list[int]] | None, float | None]:
    """The rows of the classes, the confusion matrix and the calibration error; empty and None where outputs are no scores."""
    if found.matrix is None:
        return [], None, None
    names = class_names(found)
    rows: list[dict[str, Any]] = [{"class": n, **asdict(r)} for n, r in zip(names, class_rows(found.matrix), strict=True)]
    error = None
    if found.scores is not None and found.labels is not None:
        likely = probabilities(found.scores)
        for i, row in enumerate(rows):
            row["average_precision"] = average_precision(*precision_recall(likely[:, i], found.labels == i))
        error = _calibration(found).error
    return rows, found.matrix.tolist(), error


def class_names(found: Measured) -> list[str]:
    """The names of the classes, or their indices where the dataset has no names for all of them."""
    assert found.matrix is not None
    known = found.classes or []
    return known if len(known) == len(found.matrix) else [str(i) for i in range(len(found.matrix))]


def _calibration(found: Measured) -> Reliability:
    assert found.scores is not None and found.labels is not None
    sure, pred = probabilities(found.scores).max(1)
    counts = (found.labels >= 0) & (found.labels < found.scores.shape[1])
    return reliability(sure[counts], (pred == found.labels)[counts])


def _write(folder: Path, report: Evaluation, found: Measured) -> None:
    """Write `results.json` last, so that a folder with it has the pictures too."""
    text = json.dumps(json.loads(durable.to_json(asdict(report))), indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in _pictures(found):
            data = io.BytesIO()
            image.save(data, "PNG")
            durable.replace(folder / name, data.getbuffer())
        durable.replace(folder / RESULTS, text.encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}. Choose another folder: --out.") from error


def _pictures(found: Measured) -> list[tuple[str, Any]]:
    """The charts of a classifier by file name."""
    if found.matrix is None:
        return []
    names = class_names(found)
    charts = [("confusion.png", confusion_image(found.matrix, names))]
    if found.scores is not None and found.labels is not None:
        likely = probabilities(found.scores)
        largest = sorted(range(len(names)), key=lambda i: -int((found.labels == i).sum()))[:_MAX_CURVES]  # type: ignore[union-attr]
        curves = [(i, *precision_recall(likely[:, i], found.labels == i)) for i in sorted(largest)]
        named_curves = [(names[i], recall, precision) for i, precision, recall in curves]
        charts.append(("precision_recall.png", curves_image(named_curves, "recall", "precision")))
        bins = _calibration(found)
        charts.append(("reliability.png", reliability_image(bins.count, bins.confidence, bins.accuracy)))
    return charts


def table(report: Evaluation) -> str:
    """The results as lines of text: a row per result, then a row per class."""
    bad = f", {report.bad} could not be read" if report.bad else ""
    lines = [f"{report.split}: {report.samples} samples{bad}; {report.checkpoint}, {report.epoch} epochs done"]
    wide = max([6, *map(len, report.results)])
    lines.append(f"  {'result':<{wide}}  {'value':>10}  95 % interval")
    for name, one in report.results.items():
        between = f"{one.low:.4f} to {one.high:.4f}" if one.low is not None and one.high is not None else "-"
        lines.append(f"  {name:<{wide}}  {one.value:>10.4f}  {between}")
    if report.calibration_error is not None:
        lines.append(f"  calibration error {report.calibration_error:.4f}")
    if report.classes:
        wide = max([5, *(len(row["class"]) for row in report.classes)])
        lines.append(f"  {'class':<{wide}}  samples  precision  recall      f1     iou")
        for row in report.classes[:_MAX_ROWS]:
            shares = f"{row['precision']:9.4f}  {row['recall']:.4f}  {row['f1']:.4f}  {row['iou']:.4f}"
            lines.append(f"  {row['class']:<{wide}}  {row['support']:7}  {shares}")
        if len(report.classes) > _MAX_ROWS:
            lines.append(f"  and {len(report.classes) - _MAX_ROWS} more classes in {RESULTS}")
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ailab.evaluate", description="Evaluate a checkpoint of the run of a cfg.")
    parser.add_argument("cfg", help="a Python file that defines `cfg`")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="changes to the cfg, such as work_dir=work_dir/two")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a path")
    parser.add_argument("--split", choices=PHASES, default="val", help="the split to evaluate (default: val)")
    parser.add_argument("--out", type=Path, help="folder of the files (default: WORK_DIR/evaluate/SPLIT)")
    parser.add_argument("--resamples", type=int, default=_RESAMPLES, help="draws of the bootstrap; 0: no intervals")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    try:
        _evaluate(
            lambda: load_cfg(args.cfg, args.overrides), args.checkpoint, args.split, args.out, args.resamples, rank_0_says
        )
    except (AilabError, KeyboardInterrupt) as e:
        if args.debug:
            raise
        return report_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
