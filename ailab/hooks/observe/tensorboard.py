"""TensorboardHook: every scalar of every phase as TensorBoard events, and on request histograms and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ailab.config.load import snapshot
from ailab.core.epoch import epochs_done
from ailab.errors import ConfigError
from ailab.hooks.observe.pictures import Shown, show_samples
from ailab.hooks.observe.scalars import Report, Strikes, guarded, observe
from ailab.pictures.captions import captioned
from ailab.registry import HOOKS
from ailab.stack import Middleware, unchanged
from ailab.types import Aux, Batch, Epoch, Grad, Logs, Mean, Params, Run, RunInfo, Step, TrainState

_GRADS = "gradients"  # the output under which they leave the step
_PLUMBING = {"mapping", "output_keys", "enable", "phases", "log_dir", "save_dir", "init_args"}  # keys that change no number
_FLUSH_S = 20  # how old what a dashboard shows can be


@HOOKS.register_module()
def TensorboardHook(
    interval: int = 50,
    log_dir: str | None = None,
    histograms: int = 0,
    images: int = 0,
    *,
    run: RunInfo,
    name: str = "tensorboard",
) -> list[Middleware[Any]]:
    """Every scalar of every phase as TensorBoard events over `state.step`.

    Running means of the training phase are "train/<name>", every `interval` steps; results of a phase "epoch/<phase>/<name>";
    the learning rate is "lr/<group>"; what was measured with a clock "wall/<phase>/<name>". The cfg and the results of the last
    epoch are a row of the HPARAMS tab. A resumed run purges what the interrupted one wrote after its checkpoint.

    Args:
        interval: in optimizer steps.
        log_dir: `work_dir/tensorboard` by default.
        histograms: of every parameter and its gradient, every so many epochs; 0 for none. The gradients are those of the
            epoch's last step as they are where this hook stands in the list; they leave every step, which costs their memory.
        images: how many samples of the first evaluation batch are shown each epoch with target and prediction; 0 for none.
        run: given by the framework.
        name: of this hook.

    Raises:
        ConfigError: for a negative count, or `images` of an input that is no picture.
    """
    if histograms < 0 or images < 0:
        raise ConfigError(f"cfg.hooks.{name}: histograms={histograms}, images={images}; 0 is for none, and less is nothing.")
    board = _Board(log_dir or str(run.work_dir / "tensorboard"), run)
    hooks = observe(name, board.scalars, run, every=interval, begin=board.begin, strikes=board.strikes)
    hooks += show_samples(name, images, board.pictures, run, board.strikes)
    hooks += _histograms(name, histograms, board, run) if histograms and run.steps_per_epoch else []
    return [*hooks, Middleware(name, board.closing(name), "run")]


class _Board:
    """The event file of a run; opened before the first epoch."""

    def __init__(self, folder: str, run: RunInfo):
        self.folder, self.run = folder, run
        self.writer: Any = None
        self.strikes = Strikes()
        self.rated = -1  # step of the last learning rate

    def begin(self, state: TrainState) -> None:
        """Open the file; what was written after this state's step does not count any more."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge = state.at + 1 if state.at and self.run.steps_per_epoch else None  # an evaluation adds to what is there
        self.writer = SummaryWriter(self.folder, purge_step=purge, flush_secs=_FLUSH_S)
        results = {f"epoch/{phase}/{n}": 0.0 for phase, names in self.run.result_names.items() for n in names}
        # In this folder, where the scalars are: add_hparams would make a run of its own out of them.
        experiment, started, _ = hparams(hyperparameters(self.run), results)
        for summary in (experiment, started):
            self.writer.file_writer.add_summary(summary, state.at)

    def scalars(self, report: Report) -> None:
        """One point of each curve."""
        if self.writer is None:
            return
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        for key, value in report.means.items():
            self.writer.add_scalar(f"{prefix}/{key}", value, report.step)
        for key, value in report.wall.items():
            self.writer.add_scalar(f"wall/{prefix}/{key}", value, report.step)
        if report.step == self.rated:
            return  # the results of a phase come after the running means of the same step
        self.rated = report.step
        for i, lr in enumerate(report.lrs):
            self.writer.add_scalar(f"lr/{i}", lr, report.step)

    def pictures(self, shown: Shown) -> None:
        """One image a phase, with all samples and their captions."""
        if self.writer is not None:
            self.writer.add_image(f"samples/{shown.phase}", captioned(shown.pictures), shown.step)

    def histograms(self, told: tuple[TrainState, Params]) -> None:
        """Of what is finite in each tensor."""
        state, grads = told
        for prefix, tensors in (("params", state.params), ("grads", grads)):
            for key, tensor in tensors.items():
                values = tensor.detach().float()
                finite = values[values.isfinite()]
                if self.writer is not None and finite.numel():
                    self.writer.add_histogram(f"{prefix}/{key}", finite.cpu(), state.at)

    def closing(self, name: str) -> Any:
        """Close the file when the run ends, however it ends."""
        from_end = guarded(self._end, name, self.run, self.strikes)

        def wrap(run_all: Run) -> Run:
            def closed(state: TrainState) -> TrainState:
                done = False
                try:
                    state = run_all(state)
                    done = True
                    return state
                finally:
                    from_end((state, done))

            return closed

        return wrap

    def _end(self, told: tuple[TrainState, bool]) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer, self.writer = self.writer, None
        if writer is None:
            return
        state, done = told
        if done:
            writer.file_writer.add_summary(hparams({}, {})[2], state.at)
        writer.close()


def hyperparameters(run: RunInfo) -> dict[str, int | float | str]:
    """What of the cfg tells two runs apart, by dotted path: components with their arguments, batch sizes, seed and length."""
    cfg = cast("Mapping[str, Any]", snapshot(run.cfg))
    hooks = {n: h for n, h in cfg.get("hooks", {}).items() if h.get("enable", True)}
    chosen: dict[str, Any] = {key: cfg.get(key) for key in ("seed", "total_epochs", "model", "loss", "optimizer")}
    data = {phase: cfg["data"][phase] for phase in run.phase_steps if "data" in cfg}
    sizes = {phase: cfg["data"][f"{phase}_dataloader"]["batch_size"] for phase in data}
    found = _flat({**chosen, "data": data, "batch_size": sizes, "hooks": hooks})
    return {path: value for path, value in found.items() if not _PLUMBING & {*path.split(".")}}


def _flat(value: Any, path: str = "") -> dict[str, int | float | str]:
    """A nested cfg as one dict by dotted path; lists as JSON, switches as words."""
    if isinstance(value, Mapping):
        found: dict[str, int | float | str] = {}
        for key, child in cast("Mapping[str, Any]", value).items():
            found |= _flat(child, f"{path}.{key}" if path else key)
        return found
    if value is None:
        return {}
    return {path: value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else json.dumps(value)}


def _histograms(name: str, every: int, board: _Board, run: RunInfo) -> list[Middleware[Any]]:
    """Hand out the gradients below the line, keep those of an epoch's last step, and write when the epoch has ended."""
    emit = guarded(board.histograms, name, run, board.strikes)
    newest: dict[str, Tensor] = {}

    def give(grad: Grad) -> Grad:
        def given(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            copies = {n: g.detach().clone() for n, g in grads.items()}  # an eager update may write to those it is given
            return grads, replace(aux, outputs={**aux.outputs, _GRADS: copies})

        return given

    def keep(step: Step) -> Step:
        def kept(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % run.steps_per_epoch == 0 and isinstance(logs, Logs):
                newest.clear()
                newest.update(logs.outputs[_GRADS])
            return state, logs

        return kept

    def write(epoch: Epoch) -> Epoch:
        def written(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            if epochs_done(state) % every == 0:
                emit((state, dict(newest)))
            newest.clear()
            return state, logs

        return written

    first = run.rank == 0  # the others compile the same graph and write nothing
    return [
        Middleware(name, give, "grad", core={"gives": (_GRADS,)}),
        Middleware(name, keep if first else unchanged, "host", core={"outputs": (_GRADS,)}),
        *([Middleware(name, write, "epoch")] if first else []),
    ]
