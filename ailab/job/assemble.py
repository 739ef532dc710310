"""parts -> stack: puts the hooks of a cfg around the bare callables, at the compile line and across processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ailab import dist
from ailab.compile import Compiled, compile, lift
from ailab.core.epoch import PROGRESS, eval_epoch, fresh_progress, tally, train_epoch, workflow
from ailab.core.grad import core_over_ranks, ddp_grad, graph_grad, local_core
from ailab.core.loss import state_dict_of, unless_empty
from ailab.core.run import run_epochs, run_once
from ailab.core.step import eval_step, given, split_step, tensor_outputs, train_step
from ailab.datasets import Stream
from ailab.dist import fingerprint
from ailab.errors import ConfigError, Together
from ailab.hooks.run.resume import will_resume
from ailab.job.build import Parts, build_parts, build_stream, explained
from ailab.job.guard import guarded
from ailab.job.peers import Blame, compared
from ailab.job.plan import Plan, planned, refuse_unused, verify_gradient
from ailab.job.probe import asked_outputs, batch_weight, check_fields, check_reads, check_tails, notices, probe
from ailab.job.recipe import recipe_of
from ailab.optim.state_dict import torch_state_dict
from ailab.registry import HOOKS
from ailab.stack import ROLES, Middleware, as_hooks, at, core_settings, role_of, stack, with_slots
from ailab.types import Batches, Epoch, Grad, Loss, PyTree, Run, RunInfo, Step, TrainState
from ailab.workdir import record

Hook = Middleware[Any]


@dataclass(frozen=True)
class Job:
    """A run, built and checked, that has not begun."""

    info: RunInfo
    parts: Parts
    state: TrainState
    run: Run
    hooks: Mapping[str, Sequence[Hook]]  # by phase; epoch and run hooks are in each
    streams: Mapping[str, Stream]
    steps: Mapping[str, Step]  # by phase, above the compile line, without host hooks
    plan: Plan

    def close(self) -> None:
        """End the data workers, and free what the run holds on the device. It is called before the process group ends."""
        for stream in self.streams.values():
            stream.close()
        if self.plan.replay is not None:
            self.plan.replay.close()


def assemble(
    cfg: Mapping[str, Any],
    device: torch.device,
    *,
    say: Callable[[str], None] = print,
    log_to: Callable[[Path, Callable[[str], None]], bool] = lambda file, write: False,
    interrupted: Callable[[], bool] = lambda: False,
    extra: Callable[[RunInfo], list[Hook]] = lambda run: [],
    serves: Callable[[Hook], bool] = lambda hook: True,
) -> Job:
    """Build the run of a completed cfg on this rank, up to its first step.

    Args:
        cfg: as `check.complete` returns it.
        device: where the state and the batches live.
        say: one line to the console.
        log_to: see `RunInfo`.
        interrupted: asked after each step; True ends the run there.
        extra: hooks that every run has, put inside those of the cfg.
        serves: which of the cfg's hooks take part.

    Raises:
        ConfigError: for whatever does not fit; nothing has been written by then.
        DataError: for an empty dataset, or samples that cannot be read.
    """
    parts = _alike(_built(cfg, device, fresh=not will_resume(cfg, device)))
    for line in parts.lines:
        say(line)
    streams = _streams(cfg, parts, device, say)
    views: list[Callable[[TrainState], TrainState]] = []
    keepers: list[Hook] = []  # hooks that keep memory

    @functools.cache
    def made_of() -> dict[str, Any]:
        compiled = f"{plan.cut if plan.enabled else 'no'}, sync {plan.sync}"
        return record.of_run(info, _roles(cfg, built), parts.model, parts.datasets, compiled)

    info = replace(
        _info(cfg, parts, streams, device, say),
        log_to=log_to,
        model_state=_model_state(parts, views),
        fingerprint=made_of,
        model_json=functools.cache(lambda: recipe_of(cfg, parts).to_json()),
        fresh_slots=lambda state: _memory_at(state, keepers),
    )
    built = [("", h) for h in extra(info)] + [(n, h) for n, h in _build_hooks(cfg, info) if serves(h)]
    views += [h.core["eval_state"] for _, h in built if "eval_state" in h.core]
    hooks = {p["phase"]: _served(p, cfg["workflow"], built) for p in cfg["workflow"]}
    check_fields(hooks, parts)
    state = parts.state.with_slot(PROGRESS, fresh_progress(device))
    state = with_slots(state, [h for _, h in built])
    keepers += [h for _, h in built if h.init is not None]
    info.slots.update({h.name: (f"cfg.hooks.{n}", role_of(h)) for n, h in built if h.init is not None})
    parts = _without_frozen(parts, built)
    paths = {id(h): f"cfg.hooks.{n}" for n, h in built if n}
    draws = {phase: probe(phase, parts, guarded(hooks[phase], paths), state, info) for phase in streams}
    check_reads(built, info)
    check_tails(hooks, parts, streams, state)
    if "train" in streams:
        keepers.append(tally(info.log_names["train"]))
        state = with_slots(state, keepers[-1:])
    plan = planned(cfg, info, parts, core_settings(hooks.get("train", ()), "compile"), draws.get("train"))
    if plan.enabled and plan.cut != "loss" and "train" in streams:
        verify_gradient(parts, state)
    for line in notices(hooks, parts, streams, plan.enabled):
        say(line)
    steps = {phase: _step(phase, parts, hooks[phase], state, plan, info) for phase in streams}
    run = _run(info, hooks, streams, steps, interrupted, lean=not plan.enabled)
    return Job(info, parts, state, run, hooks, streams, steps, plan)


def _streams(cfg: Mapping[str, Any], parts: Parts, device: torch.device, say: Callable[[str], None]) -> dict[str, Stream]:
    """The batches of each phase on this rank; the mistakes of all phases at once."""
    rank, world, together = dist.rank(), dist.world_size(), Together()
    made = {
        p["phase"]: together(lambda p=p: build_stream(cfg, p, parts, device, rank, world, report=say)) for p in cfg["workflow"]
    }
    together.raise_errors()
    return {phase: stream for phase, stream in made.items() if stream is not None}


def _built(cfg: Mapping[str, Any], device: torch.device, *, fresh: bool) -> Parts:
    """The parts, if every rank could build them of the same code and data."""
    if dist.world_size() == 1:
        return build_parts(cfg, device, fresh=fresh)
    parts, problem = None, None
    try:
        parts = build_parts(cfg, device, fresh=fresh)
    except Exception as e:  # the others must hear of it before it ends this rank
        problem = e
    found: dict[str, str] = {}
    if parts is not None:
        data = {f"cfg.data.{phase}": dataset for phase, dataset in parts.datasets.items()}
        found = fingerprint.of_parts({"cfg.model": parts.model, **data}, data, parts.state.params, parts.sample)
    dist.compare(found, problem)
    assert parts is not None
    return parts


def _alike(parts: Parts) -> Parts:
    """The parts on each of several ranks: rank 0's first values, and losses that know a batch of padding only."""
    if dist.world_size() == 1:
        return parts
    state = parts.state.replace(
        params=dist.broadcast_tensors(parts.state.params), buffers=dist.broadcast_tensors(parts.state.buffers)
    )
    losses = {phase: loss if parts.pad.get(phase) else unless_empty(loss) for phase, loss in parts.losses.items()}
    return replace(parts, state=state, losses=losses)


def _info(
    cfg: Mapping[str, Any],
    parts: Parts,
    streams: Mapping[str, Stream],
    device: torch.device,
    say: Callable[[str], None],
) -> RunInfo:
    optimizer = parts.optimizer
    return RunInfo(
        cfg=cfg,
        work_dir=Path(cfg["work_dir"]),
        device=device,
        seed=cfg["seed"],
        rank=dist.rank(),
        world_size=dist.world_size(),
        total_epochs=cfg["total_epochs"] if "train" in streams else 1,  # what changes nothing is not done twice
        phase_steps={phase: stream.steps for phase, stream in streams.items()},
        phase_samples={phase: stream.samples for phase, stream in streams.items()},
        base_lrs=tuple(float(g.hyper["lr"]) for g in optimizer.groups) if optimizer else (),
        say=say,
        optimizer_state=lambda state: torch_state_dict(optimizer, state.opt_state) if optimizer else {},
        late=("state", "groups") if optimizer and not optimizer.traced else (),
    )


def _model_state(parts: Parts, views: Sequence[Callable[[TrainState], TrainState]]) -> Callable[..., dict[str, torch.Tensor]]:
    """The model as evaluation sees it, by the names of the user's module; `views` are those of the hooks, in their order."""
    named = state_dict_of(parts.model)

    def model_state(state: TrainState) -> dict[str, torch.Tensor]:
        for view in reversed(views):  # an outer hook hands its state inwards
            state = view(state)
        return named(state)

    return model_state


def _build_hooks(cfg: Mapping[str, Any], info: RunInfo) -> list[tuple[str, Hook]]:
    def build(name: str, entry: Mapping[str, Any]) -> list[Hook]:
        args, path = {k: v for k, v in entry.items() if k != "enable"}, f"cfg.hooks.{name}"
        return as_hooks(explained(lambda: HOOKS.build(args, path, run=info, name=name), f"{path}: could not be built"), path)

    together = Together()
    built = {name: together(lambda n=name, e=entry: build(n, e)) for name, entry in cfg["hooks"].items() if entry["enable"]}
    together.raise_errors()
    return [(name, hook) for name, hooks in built.items() for hook in hooks or ()]


def _roles(cfg: Mapping[str, Any], built: Sequence[tuple[str, Hook]]) -> dict[str, str]:
    """The role of each hook of the cfg that is on; what has nothing to do here may have it on another machine: a "result"."""
    found = {name: [role_of(h) for n, h in built if n == name] for name, entry in cfg["hooks"].items() if entry["enable"]}
    return {name: max(roles, key=ROLES.index, default="result") for name, roles in found.items()}


def _memory_at(state: TrainState, keepers: Sequence[Hook]) -> dict[str, PyTree]:
    """What each hook would remember if it began at this state."""
    return dict(with_slots(state.replace(slots={}), keepers).slots)


def _served(entry: Mapping[str, Any], workflow: Sequence[Mapping[str, Any]], built: list[tuple[str, Hook]]) -> list[Hook]:
    """The hooks that a phase does not switch off; one around all phases stays unless each of them switches it off."""

    def on(name: str, phase: Mapping[str, Any]) -> bool:
        return phase.get(name, {}).get("enable", True)

    def around_all(hook: Hook) -> bool:
        return hook.depth == "run" or (hook.depth == "epoch" and hook.phases is None)

    return [h for n, h in built if (any(on(n, p) for p in workflow) if around_all(h) else on(n, entry))]


def _without_frozen(parts: Parts, built: Sequence[tuple[str, Hook]]) -> Parts:
    """The parts with fewer trainable parameters, where hooks keep some from being differentiated."""
    trainable = parts.trainable - {n for _, h in built for n in h.core.get("frozen", ())}
    if parts.optimizer is not None and not trainable:
        raise ConfigError("cfg.hooks: there is nothing to train: every parameter is frozen.")
    return replace(parts, trainable=frozenset(trainable))


def _step(phase: str, parts: Parts, hooks: Sequence[Hook], state: TrainState, plan: Plan, info: RunInfo) -> Step:
    """The step of one phase above the compile line."""
    loss = stack(parts.losses[phase], at(hooks, "loss", phase))
    outputs = asked_outputs(hooks, phase, parts)
    layers = [*at(hooks, "step", phase), tally(info.log_names[phase])]

    def line(step: Step, *, enabled: bool = plan.enabled, donate: bool = plan.donate, seed: int | None = info.seed) -> Compiled:
        over = compile(
            step,
            enabled=enabled,
            donate=donate,
            mode=plan.mode,
            seed=seed,
            rank=plan.rank if phase == "train" or info.world_size == 1 else info.rank,
            name=phase,
            report=info.say,
            overlap=plan.sync == "graph" and phase == "train",
            replay=plan.replay,
        )
        plan.compiled.append(over)
        return over

    if phase != "train":
        return line(stack(eval_step(loss, outputs), layers))
    assert parts.optimizer is not None
    grad = _grad(loss, parts, hooks, state, plan, info)
    traced = plan.enabled and parts.optimizer.traced
    in_place = plan.donate and not traced and not any(h.looks_back for h in layers)  # below the line donation is compile's
    if plan.cut == "step":
        return line(stack(train_step(grad, parts.optimizer, outputs, donate=in_place), layers))
    # Seeded with the whole: seeded again it would draw the numbers of the forward.
    finish = line(stack(train_step(given, parts.optimizer, outputs, donate=in_place), layers), enabled=traced, seed=None)
    if parts.optimizer.closure_update is not None:
        return line(stack(train_step(grad, parts.optimizer, outputs), layers), enabled=False)
    return line(split_step(grad, finish, outputs), enabled=False, donate=False)


def _grad(loss: Loss, parts: Parts, hooks: Sequence[Hook], state: TrainState, plan: Plan, info: RunInfo) -> Grad:
    """The gradient core of the plan, in the grad hooks."""
    bare, cut = loss, plan.enabled and plan.cut == "loss"
    if plan.enabled and plan.cut == "grad":
        loss = tensor_outputs(loss, asked_outputs(hooks, "train", parts))
    loss = lift(bare, "train loss", report=info.say) if cut else loss
    around, nominal = at(hooks, "grad"), batch_weight(bare, state, parts, info)
    if plan.sync == "ddp":
        numbers = 2 * len(info.log_names["train"]) + 2  # the weight, two for each log, and the stop flag
        settings: dict[str, Any] = {"nominal": nominal, "numbers": numbers, **core_settings(hooks, "ddp")}
        if settings.pop("split_compiled", False) and cut:
            settings["through"] = lift(bare, "train loss in parts", split=True, report=info.say)
        if not settings.get("find_unused_parameters"):
            refuse_unused(bare, state, parts)
            settings["sample"] = (bare, dict(parts.sample))
        holds = parts.optimizer is None or parts.optimizer.closure_update is not None or any(h.holds_grad for h in around)
        settings = {"gradient_as_bucket_view": not holds, **settings}
        core = ddp_grad(loss, state, parts.trainable, **settings)
    elif plan.sync == "graph":
        core = graph_grad(loss, parts.trainable, nominal=nominal, **core_settings(hooks, "graph"))
    else:
        core = local_core(loss, parts.trainable, nominal=nominal)
    if plan.enabled and plan.cut == "grad":
        core = core_over_ranks(lift(core.many, "train gradient", report=info.say))
    return stack(core, around)


def _run(
    info: RunInfo,
    hooks: Mapping[str, Sequence[Hook]],
    streams: Mapping[str, Stream],
    steps: Mapping[str, Step],
    interrupted: Callable[[], bool],
    *,
    lean: bool,
) -> Run:
    """The phases as one epoch in the epoch hooks, and the epochs as one run in the run hooks."""
    blame = Blame()
    phases: dict[str, Epoch] = {}
    for phase, step in steps.items():
        fold = train_epoch if phase == "train" else eval_epoch
        hosted = stack(step, at(hooks[phase], "host", phase))
        hosted = blame.step(hosted, phase) if info.world_size > 1 else hosted
        bare = fold(hosted, info.log_names[phase], interrupted)
        phases[phase] = stack(bare, at(hooks[phase], "epoch", phase))
    outer = next(iter(hooks.values()))
    epoch = stack(workflow(phases), at(outer, "epoch"))
    epoch = compared(epoch, info) if info.world_size > 1 else epoch

    def batches(number: int, start: int) -> Batches:
        return {p: s.epoch(number, start if p == "train" else 0, lean=lean) for p, s in streams.items()}

    bare = run_epochs(epoch, batches, info.total_epochs) if "train" in streams else run_once(epoch, batches)
    run = stack(bare, at(outer, "run"))
    return blame.run(run) if info.world_size > 1 else run
