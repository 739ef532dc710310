"""`python -m ailab.predict cfgs/exp.py photos/`: what a trained model says of new inputs; `Predictor` does it in Python."""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab import dist
from ailab.binding import bind, name_outputs
from ailab.config import check
from ailab.config.load import load as load_cfg
from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image import ImageSettings, image_settings
from ailab.datasets.input_list import Item, inputs_of
from ailab.datasets.inputs import SIZE, InputDataset
from ailab.errors import AilabError, CheckpointError, ConfigError, DataError
from ailab.hooks.run.checkpoint import directory_in
from ailab.job.answers import ANSWERS, Answer
from ailab.job.recipe import Recipe, read_recipe
from ailab.job.session import report_error
from ailab.workdir import checkpoint as checkpoints
from ailab.workdir.commit import BEST, named
from ailab.workdir.folder import CHECKPOINTS
from ailab.workdir.manifest import MANIFEST
from ailab.workdir.prediction_file import PredictionFile

_AHEAD = 3  # batches that are read while one is computed
_BAD_INPUTS = 3  # the exit code where some inputs could not be read


@dataclass(frozen=True)
class Bad:
    """An input that could not be read."""

    path: str
    index: int | None
    kind: str
    message: str

    def row(self) -> dict[str, Any]:
        """The line of bad.jsonl."""
        return {
            "path": self.path,
            **({} if self.index is None else {"index": self.index}),
            "kind": self.kind,
            "message": self.message,
        }


class Predictor:
    """A trained model that is given new inputs. It needs neither the training data nor the optimizer.

        p = Predictor("work_dir/exp")
        for row in p(["a.jpg", "photos/"]): ...  # {"path": "a.jpg", "class": "cat", "score": 0.98, ...}
        for row in p(array): ...

    Inputs are read and transformed as those of the evaluation were, by the same code. The model computes in evaluation mode, in the
    dtype of its parameters. Of several outputs the one that the loss compared with the target is answered.

    Args:
        source: A work_dir, a folder of checkpoints, or one checkpoint.
        checkpoint: "best" or "last", in a work_dir or a folder of checkpoints. None: the best one if there is `best.json`, else the
            last.
        cfg: of the run, where its model or transforms are objects that `model.json` cannot hold.
        batch_size: inputs that are computed at once, at least 1.
        workers: threads that read inputs, at least 1. None: as many as this process has CPUs.
        topk: classes of an answer, the best first; 0: all.
        threshold: classes with a lower score are left out of an answer, in [0, 1].
        tta: "flip": the mean over the input and its mirror image.
        device: None: a GPU where there is one.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its weights do not fit its model.
        ConfigError: an argument is out of range, or the model cannot be built or given one input.
    """

    def __init__(
        self,
        source: str | Path,
        checkpoint: str | None = None,
        *,
        cfg: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        topk: int = 5,
        threshold: float = 0.0,
        tta: Literal["flip"] | None = None,
        device: torch.device | str | None = None,
    ):
        if batch_size < 1 or topk < 0 or not 0 <= threshold <= 1 or (workers is not None and workers < 1):
            raise ConfigError("predict: batch_size and workers are at least 1, topk at least 0, threshold is in [0, 1].")
        self.path = _found(Path(source), checkpoint)
        content, saved = checkpoints.load(self.path)
        self.recipe = read_recipe(saved.model, self.path, cfg)
        self.step: int = saved.step
        self.batch_size, self.tta = batch_size, tta
        self.workers = workers or len(os.sched_getaffinity(0))
        self.device = torch.device(device) if device is not None else dist.pick_device()
        self.model = _loaded(self.recipe, content["model_state"], self.path).to(self.device)
        self.bad: list[Bad] = []  # of the last call without `on_bad`
        self._bound = bind(self.model, self.recipe.mapping, "model.json: model")
        self._field, self._shape = _only_field(self.recipe)
        if tta and not (self.recipe.reading.get("image") or len(self._shape) == 3):
            raise ConfigError(f"--tta {tta}: the inputs of this model are no images.")
        self.answer: Answer = ANSWERS[self.recipe.task](self.recipe.classes, topk, threshold)
        self._reader = InputDataset([None], **self.recipe.reading)

    def __call__(self, inputs: Any, *, on_bad: Callable[[Bad], None] | None = None) -> Iterator[dict[str, Any]]:
        """The answers, one after the other in the order of the inputs; memory does not grow with their number.

        Args:
            inputs: A path, a tensor or an array, or any iterable of these, see `ailab.datasets.input_list.inputs_of`.
            on_bad: Called for an input that cannot be read. By default these are kept in `bad`.

        Raises:
            DataError: A list cannot be read, or there is no input.
        """
        self.bad = []
        report = on_bad or self.bad.append
        for rows, bad, _ in self.batches(self.items(inputs)):
            for one in bad:
                report(one)
            yield from rows

    def items(self, inputs: Any) -> Iterator[Item]:
        """The inputs one by one, without reading images."""
        sources: Iterable[Any] = [inputs] if isinstance(inputs, (str, Path)) or hasattr(inputs, "shape") else inputs
        return inputs_of(sources, len(self._shape) or None)

    def batches(self, items: Iterable[Item]) -> Iterator[tuple[list[dict[str, Any]], list[Bad], int]]:
        """The answers and the bad inputs of each batch, and how many inputs it had. Some batches are read ahead by threads."""
        source = iter(items)
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque[list[tuple[Item, Future[Any]]]] = deque()
            try:
                while True:
                    while len(waiting) < _AHEAD and (some := list(islice(source, self.batch_size))):
                        waiting.append([(item, pool.submit(self._read, item)) for item in some])
                    if not waiting:
                        return
                    batch = waiting.popleft()
                    yield self._answered([(item, future.result()) for item, future in batch])
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, item: Item) -> dict[str, Tensor] | Bad:
        """The transformed fields of an input, or why there are none."""
        try:
            if isinstance(item.raw, BadFile):
                raise item.raw
            with image_settings(ImageSettings()):
                sample = self._reader._get_sample(item.raw)  # pyright: ignore[reportPrivateUsage] # by value: it holds no items
            value = sample[self._field]
            if value.is_floating_point() and bool(value.isnan().any()):
                return Bad(item.path, item.index, "not_a_number", "there is a NaN in it")
            return sample
        except BadFile as error:
            return Bad(item.path, item.index, error.kind, error.message)
        except Exception as error:  # a transform of the user may raise anything
            text = str(error).splitlines()[0][:300] if str(error) else ""
            return Bad(item.path, item.index, type(error).__name__, text)

    def _answered(self, batch: Sequence[tuple[Item, dict[str, Tensor] | Bad]]) -> tuple[list[dict[str, Any]], list[Bad], int]:
        found: dict[int, dict[str, Any] | Bad] = {i: s for i, (_, s) in enumerate(batch) if isinstance(s, Bad)}
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, (_, sample) in enumerate(batch):
            if not isinstance(sample, Bad):
                shapes.setdefault(tuple(sample[self._field].shape), []).append(i)
        for shape, places in shapes.items():
            found |= self._computed(shape, [(i, *batch[i]) for i in places])
        rows = [found[i] for i in range(len(batch))]
        return [r for r in rows if not isinstance(r, Bad)], [r for r in rows if isinstance(r, Bad)], len(batch)

    def _computed(self, shape: tuple[int, ...], group: Sequence[tuple[int, Item, Any]]) -> dict[int, dict[str, Any] | Bad]:
        """The answers to inputs of one shape, by their places."""
        stacked = torch.stack([sample[self._field] for _, _, sample in group]).to(self.device)
        try:
            values = self._forward(stacked)
        except AilabError:
            raise
        except Exception as error:  # the user's model
            if shape == self._shape:
                raise ConfigError(
                    f"the model failed on inputs of the shape {shape}: {type(error).__name__}: {error}"
                ) from error
            said = f"the model failed on the shape {shape}; it was trained on {self._shape}"
            return {i: Bad(item.path, item.index, "wrong_shape", said) for i, item, _ in group}
        answers = self.answer.rows(values, [tuple(sample[SIZE].tolist()) for _, _, sample in group])
        heads = [{"path": it.path, **({} if it.index is None else {"index": it.index})} for _, it, _ in group]
        return {i: {**head, **row} for (i, _, _), head, row in zip(group, heads, answers, strict=True)}

    def _forward(self, stacked: Tensor) -> Tensor:
        """The first output, as the answer reads it: probabilities of classes, or values. On the CPU, float32."""
        with torch.no_grad():
            values = self.answer.read(self._output(stacked))
            if self.tta == "flip":
                mirrored = self.answer.read(self._output(stacked.flip(-1)))
                values = (values + (mirrored.flip(-1) if self.answer.spatial else mirrored)) / 2
        return values.cpu()

    def _output(self, stacked: Tensor) -> Tensor:
        outputs = name_outputs(self.model(**self._bound.kwargs({self._field: stacked})), self.recipe.output_keys, "model.json")
        value = outputs[self.recipe.outputs[0]]
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the first output of the model is {type(value).__name__}, and no tensor: predict cannot answer it."
            )
        return value.float()


def _found(source: Path, which: str | None) -> Path:
    """The folder of the checkpoint."""
    if (source / MANIFEST).exists():
        return source
    directory = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    return named(which or ("best" if (directory / BEST).exists() else "last"), directory)


def _loaded(recipe: Recipe, weights: Mapping[str, Tensor], path: Path) -> torch.nn.Module:
    model = recipe.build()
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit its model: {str(error).splitlines()[-1].strip()}") from error
    return model


def _only_field(recipe: Recipe) -> tuple[str, tuple[int, ...]]:
    """The field that is predicted from, and the shape of one sample of it."""
    name = recipe.reading["field"]
    if list(recipe.fields) != [name]:
        raise ConfigError(
            f"the model reads {', '.join(recipe.fields) or 'no field'}, and predict gives it one input, {name!r}."
        )
    return name, tuple(recipe.fields[name]["shape"])


def predict(
    predictor: Predictor, inputs: Sequence[str], out: Path, *, form: str, resume: bool, part: tuple[int, int]
) -> PredictionFile:
    """Write the answers to the inputs of this process, batch by batch. Of several processes each takes every n-th batch.

    Args:
        predictor: whose `answer` says the columns.
        inputs: see `Predictor.__call__`.
        out: folder of the files.
        form: "jsonl" or "csv".
        resume: go on with what a killed process has left.
        part: (number of this process, number of processes).

    Raises:
        ConfigError: the files are there, or cannot be written.
        DataError: there is no input.
    """
    columns = ["path", "index", *predictor.answer.columns()] if form == "csv" else None
    made_of = {"checkpoint": str(predictor.path), "step": predictor.step, "inputs": list(inputs), "batch": predictor.batch_size}
    made_of |= {"answer": predictor.answer.settings(), "tta": predictor.tta}
    file = PredictionFile(out, part, columns, made_of, resume=resume)
    predictor.answer.begin(out, part[0])
    with file:
        mine = islice(_shared(predictor.items(inputs), predictor.batch_size, part), file.items, None)
        for rows, bad, items in predictor.batches(mine):
            file.append(predictor.answer.stored(rows, file.items), [b.row() for b in bad], items)
    if not file.items and part[1] == 1:
        raise DataError("there is no input.")
    return file


def _shared(items: Iterator[Item], batch_size: int, part: tuple[int, int]) -> Iterator[Item]:
    """The inputs of one of several processes: every n-th batch."""
    number = 0
    while some := list(islice(items, batch_size)):
        if number % part[1] == part[0]:
            yield from some
        number += 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ailab.predict", description="Give new inputs to a trained model.")
    parser.add_argument("cfg", help="a Python file that defines `cfg`, or the work_dir of a run")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a file, folder, pattern, list (.csv .jsonl .txt), array, or -"
    )
    parser.add_argument("--checkpoint", help="best, last, or a path (default: best where there is one, else last)")
    parser.add_argument("--out", type=Path, help="folder of the files (default: WORK_DIR/predict)")
    parser.add_argument("--format", choices=("jsonl", "csv"), default="jsonl", help="of the rows (default: jsonl)")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs that are computed at once (default: 32)")
    parser.add_argument("--workers", type=int, help="threads that read inputs (default: the CPUs of this process)")
    parser.add_argument("--topk", type=int, default=5, help="classes of an answer; 0: all (default: 5)")
    parser.add_argument("--threshold", type=float, default=0.0, help="leave out classes with a lower score (default: 0)")
    parser.add_argument("--tta", choices=("flip",), help="the mean over the input and its mirror image")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=value", help="a change to the cfg")
    parser.add_argument("--resume", action="store_true", help="go on with what a killed process has left")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(args: argparse.Namespace) -> int:
    cfg, work_dir = None, Path(args.cfg)
    source = work_dir
    if not work_dir.is_dir():
        cfg = load_cfg(args.cfg, args.set)
        check.check(cfg)
        cfg = check.complete(cfg)
        work_dir, source = Path(cfg["work_dir"]), directory_in(cfg)
    which = args.checkpoint
    if which not in (None, "best", "last"):
        source, which = Path(which), None
    settings = {"batch_size": args.batch_size, "workers": args.workers, "topk": args.topk, "threshold": args.threshold}
    predictor = Predictor(source, which, cfg=cfg, tta=args.tta, **settings)
    part = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out = args.out or work_dir / "predict"
    file = predict(predictor, args.inputs, out, form=args.format, resume=args.resume, part=part)
    print(f"{file.items} inputs, {file.bad} could not be read; {predictor.path.name}; written to {file.rows_path}", flush=True)
    if file.bad:
        print(
            f"DataError: {file.bad} of {file.items} inputs could not be read: see {file.bad_path}.", file=sys.stderr, flush=True
        )
    return _BAD_INPUTS if file.bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 3 where some inputs could not be read."""
    args = _parser().parse_intermixed_args(argv)
    try:
        return _run(args)
    except (AilabError, KeyboardInterrupt) as e:
        if args.debug:
            raise
        return report_error(e)


if __name__ == "__main__":
    sys.exit(main())
