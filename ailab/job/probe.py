"""What can only be known by trying: one shrunk step of each phase on real samples, before anything is compiled or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ailab import dist, tree
from ailab.core.grad import local_grad
from ailab.core.step import eval_step, train_step
from ailab.datasets import Stream
from ailab.errors import ConfigError, nearest
from ailab.job.build import Parts, explained
from ailab.job.draws import Draws
from ailab.job.proof import check_tail
from ailab.metrics.direction import direction_of, known
from ailab.stack import Middleware, at, stack
from ailab.types import ALL_OUTPUTS, Aux, Batch, Buffers, Grad, Loss, Params, RunInfo, TrainState, batch_size, seal

Hook = Middleware[Any]


def check_fields(hooks: Mapping[str, Sequence[Hook]], parts: Parts) -> None:
    """Compare what hooks read with what there is, all problems at once."""
    problems = [
        problem
        for phase, mine in hooks.items()
        for hook in mine
        if hook.check is not None and phase in (hook.phases or ("train",))
        for problem in hook.check(parts.fields, phase)
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def check_reads(built: Sequence[tuple[str, Hook]], info: RunInfo) -> None:
    """Compare the results that hooks need with those that an epoch of this run will have, all problems at once."""
    problems = [
        f"{path}: there is no result {name!r}.{nearest(name, info.results)}\n  An epoch of this run has: {', '.join(info.results)}."
        for _, hook in built
        for path, name in hook.reads.items()
        if name not in info.results
    ]
    for _, hook in built:
        for path, name in hook.ranks.items():
            try:
                known(None, name, info.directions, path)
            except ConfigError as e:
                problems += [str(e)] if name in info.results else []
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def asked_outputs(hooks: Sequence[Hook], phase: str, parts: Parts) -> tuple[str, ...]:
    """The model outputs, and what hooks put beside them, that host hooks of a phase read; `ALL_OUTPUTS` stands for the model's."""
    named = [n for h in at(hooks, "host", phase) for n in h.core.get("outputs", ())]
    asked = [n for name in named for n in (output_names(parts) if name == ALL_OUTPUTS else (name,))]
    offered = {*parts.fields, *(n for h in hooks for n in h.core.get("gives", ()))} - {*parts.sample}
    return tuple(dict.fromkeys(n for n in asked if n in offered))


def output_names(parts: Parts) -> tuple[str, ...]:
    """The names of the model's outputs, in its order."""
    return tuple(n for n in parts.fields if n not in parts.sample)


def probe(phase: str, parts: Parts, hooks: Sequence[Hook], state: TrainState, info: RunInfo) -> Draws:
    """Find out what a phase reports and draws, by one shrunk, uncompiled, local step; its result is thrown away."""
    losses, draws = dict[str, None](), Draws(info.device)
    loss = stack(parts.losses[phase], [Middleware("names", _noting(losses), "loss"), *at(hooks, "loss", phase)])
    outputs = asked_outputs(hooks, phase, parts)
    if phase == "train":
        assert parts.optimizer is not None
        grad = stack(draws.core(local_grad(loss, parts.trainable)), at(hooks, "grad"))
        step = stack(train_step(_blaming_loss(grad), parts.optimizer, outputs), at(hooks, "step"))
    else:
        step = stack(eval_step(loss, outputs), at(hooks, "step", phase))
    sample = dict(parts.sample)
    counted = _flop_counter() if any(h.core.get("flops") for h in at(hooks, "host", phase)) else nullcontext()
    with torch.no_grad(), counted as counter:
        draws.begin()
        after, logs = explained(lambda: step(state, sample), f"{_BLAMED[phase]}: the first {phase} step failed")
        draws.above |= draws.drawn()
    _same_shape(state, after, phase)
    seen = seal(logs)
    fields = {**sample, **seen.outputs}
    more: list[str] = []
    for h in hooks:
        if (reports := h.reports) is not None and phase in (h.phases or (phase,)):
            more += explained(lambda r=reports: r(fields, phase), f"hook {h.name!r} failed on the first samples")
    info.log_names[phase], info.result_names[phase] = seen.names, (*seen.names, *more)
    metrics = {h.name: h.core["metric"] for h in hooks if "metric" in h.core and phase in (h.phases or (phase,))}
    for name in info.result_names[phase]:
        if (direction := direction_of(name, losses, metrics)) is not None:
            info.directions[f"{phase}_{name}"] = direction
    if counter is not None:
        info.flops[phase] = counter.get_total_flops() / batch_size(sample)
    return draws


# Where a step has failed that no hook, and no gradient, has failed in.
_BLAMED = {"train": "cfg.optimizer", "val": "cfg.loss", "test": "cfg.loss"}


def _blaming_loss(grad: Grad) -> Grad:
    """`grad`; what it raises, and no hook has raised, is said to come from the loss: hooks change what it is given."""

    def blaming(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        return explained(lambda: grad(state, batch), "cfg.loss: failed in the first train step")

    return blaming


def _noting(names: dict[str, None]) -> Callable[[Loss], Loss]:
    """Puts into `names` what the bare loss logs, before any hook adds to it: the loss and its parts."""

    def wrap(loss: Loss) -> Loss:
        def noted(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            total, aux = loss(params, buffers, batch)
            names.update(dict.fromkeys(aux.logs))
            return total, aux

        return noted

    return wrap


def batch_weight(loss: Loss, state: TrainState, parts: Parts, info: RunInfo) -> float:
    """About the weight of a global batch, of how a few samples weigh: a loss over tokens counts many a sample.

    It is what gradients of parts of a batch are divided by on their way. Far too small a number, and fp16 overflows.
    """
    with torch.no_grad(), torch.random.fork_rng([info.device] if info.device.type == "cuda" else []):
        _, aux = loss(state.params, state.buffers, dict(parts.sample))
    each = float(aux.weight) / batch_size(parts.sample)
    return float(info.cfg["data"]["train_dataloader"]["batch_size"]) * (each if each > 0 else 1.0)


def _flop_counter() -> Any:
    """A context that counts the floating-point operations of matrix products, convolutions and attention in it."""
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _same_shape(before: TrainState, after: TrainState, phase: str) -> None:
    """Refuse a hook that changes the structure of the state."""
    old, new = dict(tree.items(before)), dict(tree.items(after))

    def spec(leaf: Any) -> Any:
        return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)

    changed = [p for p in {**old, **new} if p not in old or p not in new or spec(old[p]) != spec(new[p])]
    if changed and not any(
        p.startswith("opt_state.state") for p in changed
    ):  # a class's own optimizer may fill its memory late
        raise ConfigError(
            f"a {phase} step changes the structure of the state at: {', '.join(changed[:5])}.\n"
            "  A hook has to return what it was given, in shape and dtype; make its memory in `init`."
        )


def check_tails(hooks: Mapping[str, Sequence[Hook]], parts: Parts, streams: Mapping[str, Stream], state: TrainState) -> None:
    """Try the last, short batch of each phase where it is not padded and has fewer samples than the probe.

    Raises:
        ConfigError: the model fails on it; or it leaves a rank without samples, and the loss needs those of all ranks.
    """
    for phase, stream in streams.items():
        if not stream.tail or parts.pad[phase]:
            continue
        loss, before = stack(parts.losses[phase], at(hooks[phase], "loss", phase)), dist.gathers()
        check_tail(loss, state, parts.sample, max(1, stream.tail // dist.world_size()), phase)
        if stream.tail < dist.world_size() and dist.gathers() > before:
            raise ConfigError(
                f"cfg.data.{phase}: the last batch has {stream.tail} samples for {dist.world_size()} ranks, and the loss\n"
                f"  gathers those of all ranks: data.{phase}_dataloader.drop_last=True, or take another batch_size."
            )


def notices(hooks: Mapping[str, Sequence[Hook]], parts: Parts, streams: Mapping[str, Stream], compiled: bool) -> list[str]:
    """What a run does that its user may not expect, a line each."""
    lines: list[str] = []
    for phase, stream in streams.items():
        if compiled and stream.tail and not parts.pad[phase]:
            lines.append(
                f"{phase}: the last batch has {stream.tail} samples and a graph of its own: padding it would change the result"
            )
    parts_of_a_batch = [h.name for h in hooks.get("train", ()) if h.core.get("micro_batches", {}).get("n", 1) > 1]
    if parts.kind == "scalar" and "train" in streams and (parts_of_a_batch or dist.world_size() > 1):
        where = f"hooks.{parts_of_a_batch[0]} cuts a batch in parts" if parts_of_a_batch else "several ranks share a batch"
        lines.append(
            f"warning: cfg.loss returns one number, and {where}: it is taken for the mean over the samples of each part.\n"
            "  If it is a mean over tokens, or a sum, return per-sample values, ailab.Mean(total, weight) or ailab.Sum(total)."
        )
    return lines
