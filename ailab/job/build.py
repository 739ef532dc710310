"""cfg -> parts: builds every component of a run and checks on a few real samples that they fit together."""

from __future__ import annotations

import fnmatch
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ailab import tree
from ailab.binding import Binding, bind, check_outputs, name_outputs
from ailab.build import bound_criterion, loss_of
from ailab.config.schema import Model
from ailab.core.loss import Functional, kind_of, module_state, outputs_of
from ailab.datasets import Stream
from ailab.datasets.files.cache import run_cache
from ailab.datasets.stream.collate import build_collate
from ailab.datasets.stream.loading import narrow
from ailab.errors import AilabError, ConfigError, DataError, Together, nearest
from ailab.job.proof import Itself, prove_pure, row_wise
from ailab.job.weights import init_model
from ailab.optim import Optimizer, build_optimizer
from ailab.registry import DATASETS, LOSSES, MODELS, OPTIMIZERS, SAMPLERS
from ailab.rng import mix
from ailab.signature import parameters
from ailab.types import Aux, Batch, Buffers, Loss, Params, TrainState, batch_size

T = TypeVar("T")
_NO_MAPPING: Mapping[str, str] = MappingProxyType({})
_LIBRARIES = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (torch, tree))
_DOUBLES = (torch.float64, torch.complex128)
_PROBE = 4  # samples in the shrunk step that checks everything before the first real one


@dataclass(frozen=True)
class Parts:
    """The pure components of a run and its first state, on the device."""

    model: nn.Module
    optimizer: Optimizer | None
    trainable: frozenset[str]  # names of the parameters that are differentiated
    state: TrainState  # without the slots of hooks
    losses: Mapping[str, Loss]  # by phase, bare; always one for "val"
    datasets: Mapping[str, Any]
    sample: Batch  # a few real samples
    fields: tuple[str, ...]  # of a batch, and the names of the model's outputs
    pad: Mapping[str, bool]  # by phase: whether the loss can mask padding
    kind: str = "mean"  # what the criterion returns: "mean", "sum", or "scalar"
    double: bool = False  # whether data of float64 stay float64: a parameter has so many digits
    lines: tuple[str, ...] = ()  # to say once: what the first weights are, and what became of float64 data


def build_parts(cfg: Mapping[str, Any], device: torch.device, *, fresh: bool = True) -> Parts:
    """Build dataset, model, loss and optimizer of a completed cfg.

    Args:
        cfg: as `check.complete` returns it.
        device: where the state lives.
        fresh: False where a checkpoint will replace the first values of the model: `cfg.model.init` is not read then.

    Raises:
        ConfigError: when a component refuses its arguments, a mapping does not fit, or there is nothing to train.
        DataError: for an empty dataset, or samples that cannot be read.
    """
    torch.manual_seed(mix(cfg["seed"]))  # the first weights: the same on every rank
    phases = [p["phase"] for p in cfg["workflow"]]
    together = Together()
    datasets = {p: together(lambda p=p: build_dataset(cfg["data"][p], f"cfg.data.{p}")) for p in phases}
    model, criterion = together(lambda: _model(cfg, device)), together(lambda: _criterion(cfg, device))
    _ = [together(lambda p=p: _loader(cfg, p)) for p in phases]
    if together.errors:  # what depends on them may have mistakes of its own
        together(lambda: _try_optimizer(cfg, model))
    together.raise_errors()
    assert model is not None
    lines = init_model(model, cfg["model"]["init"]) if fresh and cfg["model"]["init"] else []
    state = module_state(model, criterion if isinstance(criterion, nn.Module) else None)
    state = state.replace(step=state.step.to(device))
    optimizer, trainable = _trained(cfg, state) if "train" in phases else (None, _trainable(state, cfg["optimizer"]))
    if optimizer is not None:
        state = state.replace(opt_state=optimizer.init(state.params))
    sample, double = _sample(cfg, datasets, device), any(p.dtype in _DOUBLES for p in state.params.values())
    narrowed = [n for n, t in tree.items(sample) if isinstance(t, Tensor) and t.dtype == torch.float64]
    if narrowed and not double:
        names = ", ".join(narrowed)
        lines.append(f"data: {names}: float64 in the data set, read as float32, for no parameter is float64.")
    sample = sample if double else tree.map(narrow, sample)
    fields, losses, pad, kind = _losses(cfg, model, criterion, state, sample, phases)
    return Parts(model, optimizer, trainable, state, losses, datasets, sample, fields, pad, kind, double, tuple(lines))


def build_dataset(entry: Mapping[str, Any], path: str) -> Any:
    """The dataset of an entry of `cfg.data`. Raises `DataError` for whatever its constructor raises."""
    try:
        return DATASETS.build(entry, path)
    except AilabError:
        raise
    except Exception as e:  # any class: it is the user's code that reads the user's files
        raise DataError(f"{path}: the dataset could not be opened: {_describe(e)}") from e


def _model(cfg: Mapping[str, Any], device: torch.device) -> nn.Module:
    entry = {k: v for k, v in cfg["model"].items() if k not in parameters(Model).types}
    model = explained(lambda: MODELS.build(entry, "cfg.model"), "cfg.model: could not be built")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"cfg.model.type: expected a torch.nn.Module, got {type(model).__name__}.")
    return model.to(device)


def _criterion(cfg: Mapping[str, Any], device: torch.device) -> Any:
    if cfg["loss"] is None:
        return None
    criterion = explained(
        lambda: LOSSES.build({k: v for k, v in cfg["loss"].items() if k != "mapping"}, "cfg.loss"),
        "cfg.loss: could not be built",
    )
    return criterion.to(device) if isinstance(criterion, nn.Module) else criterion


def _trained(cfg: Mapping[str, Any], state: TrainState) -> tuple[Optimizer | None, frozenset[str]]:
    """The optimizer, and the names of the parameters that it trains."""
    trainable = _trainable(state, cfg["optimizer"])
    if not trainable:
        raise ConfigError("cfg.model: there is nothing to train: no parameter requires grad and is not frozen.")
    return _optimizer(cfg["optimizer"], state, trainable), trainable


def _try_optimizer(cfg: Mapping[str, Any], model: nn.Module | None) -> None:
    """Build the optimizer where the model or the loss could not be built: for the mistakes that do not depend on names."""
    if cfg["optimizer"]:
        state = module_state(nn.Linear(1, 1) if model is None or not list(model.parameters()) else model)
        _optimizer({**cfg["optimizer"], "param_groups": []}, state, frozenset(state.params))


def _trainable(state: TrainState, optimizer: Mapping[str, Any] | None) -> frozenset[str]:
    """Names of the parameters that require grad and that no pattern of `optimizer.freeze` matches."""
    free = {n for n, p in state.params.items() if p.requires_grad}
    for i, pattern in enumerate((optimizer or {}).get("freeze", ())):
        hit = {n for n in state.params if fnmatch.fnmatchcase(n, pattern)}
        if not hit:
            hint = nearest(pattern, state.params)
            raise ConfigError(f"cfg.optimizer.freeze[{i}]: no parameter matches {pattern!r}.{hint}")
        free -= hit
    return frozenset(free)


def _optimizer(cfg: Mapping[str, Any], state: TrainState, trainable: frozenset[str]) -> Optimizer:
    cls: Any = OPTIMIZERS.get(cfg["type"], "cfg.optimizer.type")
    hyper = {k: v for k, v in cfg.items() if k not in ("type", "freeze", "param_groups")}
    frozen = [n for n in state.params if n not in trainable]
    return build_optimizer(cls, state.params, param_groups=cfg["param_groups"], frozen=frozen, **hyper)


def _loader(cfg: Mapping[str, Any], phase: str) -> tuple[Any, Any]:
    """The collate function and the sampler of a phase."""
    entry, path = cfg["data"][f"{phase}_dataloader"], f"cfg.data.{phase}_dataloader"
    sampler = None if entry["sampler"] is None else SAMPLERS.build(entry["sampler"], f"{path}.sampler")
    return build_collate(entry["collate_fn"], f"{path}.collate_fn"), sampler


def _sample(cfg: Mapping[str, Any], datasets: Mapping[str, Any], device: torch.device) -> Batch:
    """A few real samples of the first phase, read as its stream will read them, in the dtypes of the data set."""
    phase, dataset = next(iter(datasets.items()))

    def quiet(line: str) -> None:
        """Bad samples are reported when the run reads them."""

    size = min(_PROBE, len(dataset)) if hasattr(dataset, "__len__") else _PROBE
    stream = Stream(
        dataset,
        batch_size=max(size, 1),
        shuffle=False,
        seed=cfg["seed"],
        pad=False,
        iters=1,
        collate_fn=_loader(cfg, phase)[0],
        name=f"cfg.data.{phase}",
        report=quiet,
        max_bad_frac=1.0,
        double=True,
        **reading_of(cfg),
    )
    batch = next(iter(stream.epoch(0)))
    try:
        batch_size(batch)
    except ConfigError as e:
        raise ConfigError(
            f"cfg.data.{phase}: {e}\n  A sample needs a tensor, an array or a number, such as its index: {{'index': i, ...}}."
        ) from e
    return tree.to(batch, device)


def _losses(
    cfg: Mapping[str, Any], model: nn.Module, criterion: Any, state: TrainState, sample: Batch, phases: list[str]
) -> tuple[tuple[str, ...], dict[str, Loss], dict[str, bool], str]:
    """The fields of a run, the bare loss of each phase, whether it can mask padding, and of what kind it is."""
    keys, path = cfg["model"]["output_keys"], "cfg.model.output_keys"
    mapping, loss_mapping = cfg["model"]["mapping"], cfg["loss"]["mapping"] if cfg["loss"] else _NO_MAPPING
    bound = bind(model, mapping, "cfg.model")
    _refuse(bound.check(sample))
    with torch.no_grad():
        forward, buffers = Functional(model, training=phases[0] == "train"), tree.clone(state.buffers)
        result = explained(
            lambda: forward(state.params, buffers, bound.kwargs(sample)), "cfg.model: failed on the first samples"
        )
    outputs = name_outputs(result, keys, path)
    fields = (*sample, *outputs)
    problems = check_outputs(list(outputs), list(sample), path)
    named = list(outputs)
    _, loss_bound = bound_criterion(criterion, loss_mapping, True, named)
    _refuse(problems + (loss_bound.check(fields) if loss_bound else []))
    if criterion is None and "loss" not in outputs:
        if "train" in phases:
            raise ConfigError(
                f"cfg.workflow: the phase 'train' needs cfg.loss; the model gives {', '.join(outputs)} and no 'loss'."
            )
        unscored = _unscored(Functional(model, training=False), bound, keys)
        pad = row_wise(unscored, state, sample)
        return fields, dict.fromkeys(phases, unscored), dict.fromkeys(phases, pad), "mean"
    losses = {
        phase: loss_of(
            model,
            criterion,
            training=phase == "train",
            mapping=mapping,
            loss_mapping=loss_mapping,
            output_keys=keys,
            outputs=named,
        )
        for phase in dict.fromkeys([*phases, "val"])  # "val" in any case: a loss without randomness is what checks need
    }
    itself = Itself(model, bound, criterion, loss_bound, keys)
    first = losses[phases[0]]
    training = phases[0] == "train"
    explained(lambda: prove_pure(itself, first, state, sample, training=training), "cfg.loss: failed on the first samples")
    pad = {phase: row_wise(losses[phase], state, sample) for phase in phases}
    return fields, losses, pad, kind_of(first, state.params, tree.clone(state.buffers), sample)


def _unscored(forward: Functional, bound: Binding, keys: Sequence[str]) -> Loss:
    """The loss depth of an evaluation without a criterion: outputs for the metrics, and no number of its own."""

    def loss(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        after = {n: b.clone() for n, b in buffers.items()}  # a forward may write to what it is given
        outputs = outputs_of(forward, bound, keys, params, after, batch)
        nothing = torch.zeros((), device=next(t.device for t in tree.leaves(batch) if isinstance(t, Tensor)))
        return nothing, Aux(after, nothing, {}, outputs)

    return loss


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def explained(call: Callable[[], T], what: str) -> T:
    """The result of user code; what it raises becomes one message that says where.

    Raises:
        ConfigError: with the exception's own words; the traceback is kept as its cause.
    """
    try:
        return call()
    except AilabError:
        raise
    except Exception as e:  # any class: it is the user's model, loss, metric or hook
        raise ConfigError(f"{what}: {_describe(e)}") from e


def _describe(e: Exception) -> str:
    """The class and the first lines of an exception, and where it was raised; --debug shows the rest."""
    frames = traceback.extract_tb(e.__traceback__)
    frame = ([f for f in frames if not f.filename.startswith(_LIBRARIES)] or frames)[-1]  # the user's own line, if there is one
    text = [line.strip()[:400] for line in str(e).splitlines() if line.strip()][:2]
    return "\n  ".join([f"{type(e).__name__}: {text[0] if text else ''}", *text[1:], f"{frame.filename}, line {frame.lineno}"])


def build_stream(
    cfg: Mapping[str, Any],
    entry: Mapping[str, Any],
    parts: Parts,
    device: torch.device,
    rank: int,
    world_size: int,
    **more: Any,
) -> Stream:
    """The batches of one workflow entry on this rank."""
    phase = entry["phase"]
    loader = dict(cfg["data"][f"{phase}_dataloader"])
    loader["collate_fn"], loader["sampler"] = _loader(cfg, phase)
    if loader["shuffle"] is None:
        loader["shuffle"] = phase == "train"
    if loader["persistent_workers"] is None:
        loader["persistent_workers"] = loader["num_workers"] > 0
    optional = ("prefetch_factor", "multiprocessing_context")
    loader = {k: v for k, v in loader.items() if k not in optional or (v and loader["num_workers"])}
    return Stream(
        parts.datasets[phase],
        seed=cfg["seed"],
        rank=rank,
        world_size=world_size,
        pad=parts.pad[phase],
        sized=parts.kind == "sum" and world_size > 1,
        double=parts.double,
        device=device,
        iters=entry["iters"],
        name=f"cfg.data.{phase}",
        max_bad_frac=cfg["data"]["max_bad_frac"],
        **reading_of(cfg),
        **loader,
        **more,
    )


def reading_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """How samples are read, in any phase."""
    data = cfg["data"]
    return {
        "truncated": data["truncated"],
        "nan_is_bad": data["nan_is_bad"],
        "cache": run_cache(data["cache"], Path(cfg["work_dir"])),
    }
