"""TensorboardHook: every scalar of every phase as TensorBoard events. Optional histograms and images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ailab.config.load import snapshot
from ailab.core.epoch import began, epochs_done
from ailab.errors import ConfigError
from ailab.hooks.observe.pictures import SamplePictures, show_samples
from ailab.hooks.observe.scalars import Failures, Report, guarded, observe
from ailab.pictures.captions import captioned
from ailab.registry import HOOKS
from ailab.stack import Middleware, unchanged
from ailab.types import Aux, Batch, Epoch, Grad, Logs, Mean, Params, Run, RunInfo, Step, TrainState

_GRADS = "gradients"  # the name of the step output that holds them
# keys that change no result
_NOT_HYPERPARAMETERS = {"mapping", "output_keys", "enable", "phases", "log_dir", "save_dir", "init_args"}
_FLUSH_S = 20  # seconds between two writes to the file


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
    """Write every scalar of every phase as TensorBoard events over `state.step`.

    Running means of the training phase are "train/<name>", every `interval` steps. Results of a phase are
    "epoch/<phase>/<name>". Learning rates are "lr/<group>". Wall-clock measurements are "wall/<phase>/<name>". The cfg and the
    results of the last epoch are a row of the HPARAMS tab. A resumed run purges the events that the interrupted run wrote after
    the checkpoint.

    Args:
        interval: optimizer steps between two points of a running mean, at least 1.
        log_dir: folder of the event files. `work_dir/tensorboard` by default.
        histograms: epochs between two histograms of every parameter and its gradient. 0: no histograms. The gradient is that of
            the last step of the epoch, after the grad hooks listed before this one. Every step returns its gradients, which
            costs their memory.
        images: samples of the first evaluation batch to show each epoch, with target and prediction. 0: no images.

    Raises:
        ConfigError: for a negative `histograms` or `images`, or when `images` is set and the input is not a batch of images.
    """
    if histograms < 0 or images < 0:
        raise ConfigError(f"cfg.hooks.{name}: histograms={histograms}, images={images}; both must be at least 0 (0: none).")
    writer = _Writer(log_dir or str(run.work_dir / "tensorboard"), run)
    hooks = observe(name, writer.scalars, run, every=interval, begin=writer.begin, failures=writer.failures)
    hooks += show_samples(name, images, writer.pictures, run, writer.failures)
    hooks += _histograms(name, histograms, writer, run) if histograms and run.steps_per_epoch else []
    return [*hooks, Middleware(name, writer.close_at_end(name), "run")]


class _Writer:
    """Writes the event file of a run. It is opened before the first epoch."""

    def __init__(self, folder: str, run: RunInfo):
        self.folder, self.run = folder, run
        self.events: Any = None
        self.failures = Failures()
        self.lr_step = -1  # step of the last learning rate written

    def begin(self, state: TrainState) -> None:
        """Open the file. Events after the step of this state are purged."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        purge = state.at + 1 if state.at and self.run.steps_per_epoch else None  # an evaluation adds to the events that exist
        self.events = SummaryWriter(self.folder, purge_step=purge, flush_secs=_FLUSH_S)
        results = {f"epoch/{phase}/{n}": 0.0 for phase, names in self.run.result_names.items() for n in names}
        # In the folder of the scalars: add_hparams would make a second run for them.
        experiment, started, _ = hparams(hyperparameters(self.run), results)
        for summary in (experiment, started):
            self.events.file_writer.add_summary(summary, state.at)

    def scalars(self, report: Report) -> None:
        """Write one point of each curve."""
        if self.events is None:
            return
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        for key, value in report.means.items():
            self.events.add_scalar(f"{prefix}/{key}", value, report.step)
        for key, value in report.wall.items():
            self.events.add_scalar(f"wall/{prefix}/{key}", value, report.step)
        if report.step == self.lr_step:
            return  # the results of a phase come after the running means of the same step
        self.lr_step = report.step
        for i, lr in enumerate(report.lrs):
            self.events.add_scalar(f"lr/{i}", lr, report.step)

    def pictures(self, samples: SamplePictures) -> None:
        """Write one image with all samples and their captions."""
        if self.events is not None:
            self.events.add_image(f"samples/{samples.phase}", captioned(samples.pictures), samples.step)

    def histograms(self, state_and_grads: tuple[TrainState, Params]) -> None:
        """Write a histogram of the finite elements of each parameter and gradient."""
        state, grads = state_and_grads
        for prefix, tensors in (("params", state.params), ("grads", grads)):
            for key, tensor in tensors.items():
                values = tensor.detach().float()
                finite = values[values.isfinite()]
                if self.events is not None and finite.numel():
                    self.events.add_histogram(f"{prefix}/{key}", finite.cpu(), state.at)

    def close_at_end(self, name: str) -> Any:
        """A run middleware that closes the file when the run ends, with or without an error."""
        close = guarded(self._close, name, self.run, self.failures)

        def wrap(run_all: Run) -> Run:
            def closed(state: TrainState) -> TrainState:
                done = False
                try:
                    state = run_all(state)
                    done = True
                    return state
                finally:
                    close((state, done))

            return closed

        return wrap

    def _close(self, state_and_done: tuple[TrainState, bool]) -> None:
        from torch.utils.tensorboard.summary import hparams

        events, self.events = self.events, None
        if events is None:
            return
        state, done = state_and_done
        if done:
            events.file_writer.add_summary(hparams({}, {})[2], state.at)
        events.close()


def hyperparameters(run: RunInfo) -> dict[str, int | float | str]:
    """The hyper-parameters of the cfg by dotted path: components with their arguments, batch sizes, seed and epochs."""
    cfg = cast("Mapping[str, Any]", snapshot(run.cfg))
    hooks = {n: h for n, h in cfg.get("hooks", {}).items() if h.get("enable", True)}
    chosen: dict[str, Any] = {key: cfg.get(key) for key in ("seed", "total_epochs", "model", "loss", "optimizer")}
    data = {phase: cfg["data"][phase] for phase in run.phase_steps if "data" in cfg}
    sizes = {phase: cfg["data"][f"{phase}_dataloader"]["batch_size"] for phase in data}
    found = _flattened({**chosen, "data": data, "batch_size": sizes, "hooks": hooks})
    return {path: value for path, value in found.items() if not _NOT_HYPERPARAMETERS & {*path.split(".")}}


def _flattened(value: Any, path: str = "") -> dict[str, int | float | str]:
    """A nested cfg as one dict by dotted path. Lists and booleans become JSON text."""
    if isinstance(value, Mapping):
        found: dict[str, int | float | str] = {}
        for key, child in cast("Mapping[str, Any]", value).items():
            found |= _flattened(child, f"{path}.{key}" if path else key)
        return found
    if value is None:
        return {}
    return {path: value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else json.dumps(value)}


def _histograms(name: str, every: int, writer: _Writer, run: RunInfo) -> list[Middleware[Any]]:
    """Return the gradients from the compiled step, keep those of the last step of an epoch, write them after the epoch."""
    emit = guarded(writer.histograms, name, run, writer.failures)
    newest: dict[str, Tensor] = {}
    last = 0  # step of the running epoch

    def expose(grad: Grad) -> Grad:
        def exposed(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            copies = {n: g.detach().clone() for n, g in grads.items()}  # an eager optimizer may write to its inputs
            return grads, replace(aux, outputs={**aux.outputs, _GRADS: copies})

        return exposed

    def keep(step: Step) -> Step:
        def kept(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at == last and isinstance(logs, Logs):
                newest.clear()
                newest.update(logs.outputs[_GRADS])
            return state, logs

        return kept

    def write(epoch: Epoch) -> Epoch:
        def written(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            nonlocal last
            last = began(state) + run.steps_per_epoch
            state, logs = epoch(state, batches)
            if epochs_done(state) % every == 0:
                emit((state, dict(newest)))
            newest.clear()
            return state, logs

        return written

    first = run.rank == 0  # the other ranks compile the same graph and write nothing
    return [
        Middleware(name, expose, "grad", role="observer", core={"gives": (_GRADS,)}),
        Middleware(name, keep if first else unchanged, "host", core={"outputs": (_GRADS,)}),
        *([Middleware(name, write, "epoch", role="observer")] if first else []),
    ]
