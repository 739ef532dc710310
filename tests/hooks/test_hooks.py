"""The laws of hooks. A new hook in ailab.hooks is found automatically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_cfg
from torch import nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import compile
from ailab.config import check
from ailab.core.epoch import epoch_ended
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.errors import ConfigError, NonFiniteError
from ailab.hooks import AMPHook, EMAHook, GradAccumulateHook, GradClipHook, LrSchedulerHook, SkipNonFiniteHook
from ailab.job.assemble import assemble
from ailab.optim import build_optimizer
from ailab.registry import HOOKS
from ailab.signature import parameters
from ailab.stack import Middleware, as_hooks, at, stack
from ailab.testing import TinyNet, check_hook, check_identity
from ailab.types import WEIGHT, Aux, Batch, Grad, Logs, Mean, Params, RunInfo, Step, TrainState

ARGUMENTS: dict[str, dict[str, Any]] = {  # what a hook needs, or what makes it do something
    "AMPHook": dict(dtype="bf16"),
    "AugmentHook": dict(ops=[]),
    "EarlyStopHook": dict(metric="train_loss"),
    "FreezeHook": dict(params=["0.*"], until=1, by="step"),
    "GradAccumulateHook": dict(n=3),
    "GradStatsHook": dict(patterns={"last": "3.*"}),
    "LabelSmoothingHook": dict(classes=3),
    "LookaheadHook": dict(k=2),
    "RematHook": dict(modules=["0", "1"]),
    "SWAHook": dict(start=1, by="step"),
    "GradClipHook": dict(max_norm=0.1),
    "LrSchedulerHook": dict(by="step", scheduler=dict(type="StepLR", step_size=1)),
    "LoggerHook": dict(interval=1),
    "MetricHook": dict(top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}, phases=["train"])),
    "TensorboardHook": dict(interval=1),
    "WandbHook": dict(interval=1, init_args=dict(mode="disabled")),
}
OWN = [n for n in HOOKS.names() if HOOKS.get(n).__module__.startswith("ailab.")]


def info(folder: Path, total_epochs: int = 3) -> RunInfo:
    return RunInfo(
        cfg={"workflow": [{"phase": "train"}], "hooks": {}},
        work_dir=folder,
        device=torch.device("cpu"),
        seed=0,
        rank=0,
        world_size=1,
        total_epochs=total_epochs,
        phase_steps={"train": 2},
        log_names={"train": ("loss",)},
        base_lrs=(0.1,),
        say=lambda line: None,
    )


def made(name: str, folder: Path, **more: Any) -> Any:
    given = {**ARGUMENTS.get(name, {}), **more}
    missing = [p for p in parameters(HOOKS.get(name)).required if p not in given and p not in ("run", "name")]
    assert not missing, f"{name} needs {missing}: add a row to ARGUMENTS"
    return as_hooks(HOOKS.build({"type": name, **given}, f"cfg.hooks.{name}", run=info(folder)), name)


@pytest.mark.parametrize("name", OWN)
def test_the_laws(name: str, tmp_path: Path, aot_eager: None) -> None:
    """Traced hooks are pure, keep the structure and compile to the eager numbers; host hooks change neither state nor logs."""
    if name in ("TensorboardHook", "WandbHook"):
        pytest.importorskip("tensorboard" if name == "TensorboardHook" else "wandb", reason="an optional writer")
    check_hook(made(name, tmp_path), compiled=True)


@pytest.mark.parametrize(
    "hooks", [[GradClipHook(max_norm=float("inf"))], [GradAccumulateHook(1)], SkipNonFiniteHook(), SkipNonFiniteHook("skip")]
)
def test_identity_settings_are_identities(hooks: list[Any]) -> None:
    """clip(inf), accumulate(1) and a skip that has nothing to skip leave parameters, buffers and momentum bitwise alone."""
    check_identity(hooks)


def test_an_average_without_memory_is_the_parameters() -> None:
    """ema(0) is the parameters themselves, bitwise."""
    net = TinyNet(EMAHook(decay=0.0))
    state, _ = net.run(net.step())
    assert all(torch.equal(state.slots["ema"][n], p) for n, p in state.params.items())


@pytest.mark.parametrize("n", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_is_the_full_batch(n: int, masked: bool) -> None:
    """accumulate(n) gives the gradient and the loss of the full batch to 1e-6, whatever n divides and whatever is masked."""
    nets = [TinyNet(), TinyNet([GradAccumulateHook(n)])]
    results = []
    for net in nets:
        net.model[1] = nn.Identity()  # batch norm sees micro-batches
        batch = net.batches[0]
        if masked:
            batch = {**batch, WEIGHT: torch.tensor([1.0, 0, 1, 1, 0, 0])}
        results.append(stack(local_grad(net.loss()), at(net.hooks, "grad"))(net.state, batch))
    (a, a_aux), (b, b_aux) = results
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a_aux.logs["loss"].value, b_aux.logs["loss"].value, rtol=1e-6, atol=1e-6)


def test_clipping_equals_torch() -> None:
    """The clipped gradient and the logged norm are those of clip_grad_norm_; by value, those of clip_grad_value_."""
    net = TinyNet()
    grads, _ = local_grad(net.loss())(net.state, net.batches[0])
    for hook, oracle in (
        (GradClipHook(max_norm=0.1), lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.1)),
        (GradClipHook(max_value=0.01), lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.01)),
    ):
        params = [nn.Parameter(p.clone()) for p in net.state.params.values()]
        for p, g in zip(params, grads.values(), strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        oracle(params)
        mine, aux = hook(local_grad(net.loss()))(net.state, net.batches[0])
        torch.testing.assert_close(aux.logs["grad_norm"].value, norm)
        for p, g in zip(params, mine.values(), strict=True):
            torch.testing.assert_close(g, p.grad)


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_schedules_equal_torch(by: str, tmp_path: Path) -> None:
    """The rate of every update is the one torch's scheduler had before it, by epoch and by step, bitwise."""
    cfg = dict(type="CosineAnnealingLR", T_max=3)
    net = TinyNet(as_hooks(LrSchedulerHook(cfg, by=by, run=info(tmp_path)), "lr"))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    state, step = net.state, net.step()
    for i in range(6):
        state, _ = step(state, net.batches[i % 2])
        state = epoch_ended(state) if i % 2 == 1 else state
        assert float(state.opt_state["lr"][0]) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        if by == "step" or i % 2 == 1:
            scheduler.step()


def test_only_steps_that_are_not_finite_are_skipped() -> None:
    """A NaN batch changes nothing but the step count and the counter; the steps around it are as without it; ten end the run."""
    net = TinyNet(SkipNonFiniteHook("skip", max_in_a_row=3, every=1))
    bad = {**net.batches[0], "input": torch.full((6, 4), float("nan"))}
    step = stack(compile(net.step(), enabled=False, donate=False), at(net.hooks, "host"))
    state, _ = step(net.state, net.batches[0])
    skipped, logs = step(state, bad)
    assert skipped.at == 2
    assert float(logs["skipped"].value) == 1.0
    for field in ("params", "buffers", "opt_state"):
        pairs = zip(tree.leaves(getattr(state, field)), tree.leaves(getattr(skipped, field)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    skipped, _ = step(skipped, bad)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        step(skipped, bad)


def test_half_precision_scales_as_torch_does(tmp_path: Path) -> None:
    """Over 200 steps with overflows the fp16 scale, the skips and the parameters are those of torch.amp.GradScaler."""
    hooks = AMPHook("fp16", init_scale=2.0**8, growth_interval=5, run=info(tmp_path))
    net = TinyNet([h for h in hooks if h.depth != "loss"])  # the scale is what is tested; the forward stays float32
    model, scaler = net.model, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    model.load_state_dict({**net.state.params, **net.state.buffers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state, step = net.state.clone(), net.step()
    for i in range(200):
        batch = dict(net.batches[i % 2])
        if i % 7 == 3:
            batch["input"] = batch["input"] * float("inf")
        kept = {n: b.clone() for n, b in model.named_buffers()}
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(batch["input"]), batch["target"])).backward()
        scaler.step(optimizer)
        scaler.update()
        if i % 7 == 3:  # ours undoes the whole step, the running statistics of batch norm included
            model.load_state_dict({**dict(model.named_parameters()), **kept})
        state, _ = step(state, batch)
        assert float(state.slots["amp"]["scale"]) == scaler.get_scale(), f"step {i}"
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_autocast_reaches_the_forward(tmp_path: Path) -> None:
    """Under AMPHook("bf16") the model computes in bfloat16, and gradients and parameters are float32."""
    net = TinyNet(AMPHook("bf16", run=info(tmp_path)))
    _, aux = net.loss()(net.state.params, net.state.buffers, net.batches[0])
    assert aux.outputs["output"].dtype == torch.bfloat16
    state, _ = net.run(net.step())
    assert {p.dtype for p in state.params.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradClipHook(), "one of max_norm and max_value"),
        (lambda: GradClipHook(max_norm=-1.0), "positive"),
        (lambda: GradAccumulateHook(0), "at least 1"),
        (lambda: EMAHook(decay=1.5), r"in \[0, 1\]"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    """A setting that makes no sense is a ConfigError when the hook is built."""
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_small_weight_of_the_average_keeps_its_digits() -> None:
    """With decay 0.9999 a step moves the average by 1e-4 of the distance, to six digits: 1 - decay is not in float32."""
    [update, _] = EMAHook(decay=0.9999, warmup=False)
    one, zero = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    state = TrainState(torch.tensor(1), one, {}, {}, {"ema": zero})
    after, _ = update(lambda state, batch: (state, {}))(state, {})
    torch.testing.assert_close(after.slots["ema"]["w"], torch.tensor([1e-4]), rtol=1e-6, atol=0)


def overflowing(micro: int | None = None) -> Middleware[Any]:
    """A gradient with an infinity in it; with `micro` only that one of the calls within a step."""
    calls = 0

    def wrap(grad: Grad) -> Grad:
        def spoilt(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            nonlocal calls
            grads, aux = grad(state, batch)
            hit = micro is None or calls == micro
            calls += 1
            return ({n: g + float("inf") for n, g in grads.items()} if hit else grads), aux

        return spoilt

    return Middleware("overflowing", wrap, "grad")


@pytest.mark.parametrize("name", ["SkipNonFiniteHook", "AMPHook"])
@pytest.mark.parametrize("hiding", ["clip", "signs", "first_micro_batch", "last_micro_batch"])
def test_an_overflow_cannot_hide(name: str, hiding: str, tmp_path: Path) -> None:
    """An infinite gradient skips the step, also where clipping by value, a sign optimizer or a micro-batch would hide it."""
    hooks = [h for h in made(name, tmp_path, **({"dtype": "fp16"} if name == "AMPHook" else {})) if h.depth != "loss"]
    spoilt = overflowing({"first_micro_batch": 0, "last_micro_batch": 2}.get(hiding))
    behind = {"clip": [GradClipHook(max_value=1.0)], "signs": []}.get(hiding, [GradAccumulateHook(3)])
    net = TinyNet([spoilt, *hooks, *behind])
    if hiding == "signs":
        net.optimizer = build_optimizer("Rprop", net.state.params, lr=0.1)
        net.state = net.state.replace(opt_state=net.optimizer.init(net.state.params))
    after, _ = net.step()(net.state, net.batches[0])
    assert after.at == 1
    for field in ("params", "buffers", "opt_state"):
        pairs = zip(tree.items(getattr(net.state, field)), tree.items(getattr(after, field)), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs), field
    if name == "AMPHook":
        assert float(after.slots["amp"]["scale"]) == 2.0**15
    again, _ = net.step()(after.replace(slots=net.state.slots), net.batches[0])
    assert (hiding in ("clip", "signs")) == torch.equal(again.params["0.weight"], net.state.params["0.weight"])


def test_a_scale_that_would_overflow_stays(tmp_path: Path) -> None:
    """As in GradScaler, a scale whose double is infinite is kept."""
    hooks = AMPHook("fp16", init_scale=2.0**127, growth_interval=1, run=info(tmp_path))
    step = next(h for h in hooks if h.depth == "step")
    state = TrainState(torch.tensor(0), {}, {}, {}, {"amp": step.init(TinyNet().state)})  # type: ignore[misc]
    after, _ = step(lambda state, batch: (state, {}))(state, {})
    assert float(after.slots["amp"]["scale"]) == 2.0**127


def test_accumulation_concatenates_outputs() -> None:
    """Model outputs are those of the whole batch. A field that is not per sample is in every micro-batch."""
    seen: list[tuple[int, ...]] = []

    def loss(params: Params, buffers: Params, batch: Batch) -> tuple[torch.Tensor, Aux]:
        seen.append((len(batch["input"]), len(batch["prior"]), batch["scale"].dim()))
        total = (params["w"] * batch["input"]).sum() * batch["prior"].sum()
        weight = torch.tensor(float(len(batch["input"])))
        outputs = {"output": batch["input"] * 2, "prior": batch["prior"]}
        return total, Aux({}, weight, {"loss": Mean(total.detach(), weight)}, outputs)

    state = TrainState(torch.tensor(0), {"w": torch.ones(())}, {}, {}, {})
    batch = {"input": torch.arange(7.0), "prior": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.tensor(2.0)}
    whole, aux = local_grad(loss)(state, batch)
    cut, cut_aux = GradAccumulateHook(3)(local_grad(loss))(state, batch)
    assert seen == [(7, 3, 0), (3, 3, 0), (3, 3, 0), (1, 3, 0)]
    torch.testing.assert_close(cut["w"], whole["w"])
    assert torch.equal(cut_aux.outputs["output"], aux.outputs["output"])
    assert torch.equal(cut_aux.outputs["prior"], batch["prior"])


@pytest.mark.parametrize("n", [2, 4, 5])
def test_accumulation_of_a_weighted_loss_is_the_full_batch(n: int) -> None:
    """Class weights, ignored targets and masks: accumulate(n) gives the full batch's gradient to 1e-6 all the same."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 7.0]), ignore_index=-1)
    state, g = module_state(model, criterion), torch.Generator().manual_seed(2)
    batch = {
        "input": torch.randn(10, 4, generator=g),
        "target": torch.tensor([0, 2, 1, -1, 0, 2, 2, 1, 0, 1]),
        WEIGHT: torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 1, 1, 0]),
    }
    grad = local_grad(loss_of(model, criterion))
    (a, a_aux), (b, b_aux) = grad(state, batch), GradAccumulateHook(n)(grad)(state, batch)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a_aux.logs["loss"].value, b_aux.logs["loss"].value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_long_schedule_equals_torch(accumulated: bool, tmp_path: Path) -> None:
    """Over 100 updates a cyclic schedule by step is torch's, bitwise; a batch in micro-batches is one update."""
    cfg = dict(type="OneCycleLR", max_lr=0.3, total_steps=101)
    hooks = as_hooks(LrSchedulerHook(cfg, by="step", run=info(tmp_path, total_epochs=50)), "lr")
    net = TinyNet([*hooks, *([GradAccumulateHook(3)] if accumulated else [])])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=101)
    state, step = net.state, net.step()
    for i in range(100):
        state, _ = step(state, net.batches[i % 2])
        assert float(state.opt_state["lr"][0]) == optimizer.param_groups[0]["lr"], f"update {i}"
        optimizer.step()
        scheduler.step()


def test_a_plateau_equals_torch(tmp_path: Path) -> None:
    """ReduceLROnPlateau lowers the rate after the epochs after which torch's does, bitwise, and remembers in the state."""
    cfg = dict(type="ReduceLROnPlateau", factor=0.5, patience=1, cooldown=1)
    hook = LrSchedulerHook(cfg, metric="val_loss", run=info(tmp_path))
    net = TinyNet([hook])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=1)
    state = net.state
    for value in [3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 1.0, 1.5, 1.5, 1.5, 1.5]:
        logs = Logs(("val_loss",), torch.tensor([[value, 1.0]], dtype=torch.float64))
        epoch = LrSchedulerHook(cfg, metric="val_loss", run=info(tmp_path))  # a new one: all memory is in the state
        state, _ = epoch(lambda state, batches, logs=logs: (state, logs))(state, {})
        scheduler.step(value)
        assert float(state.opt_state["lr"][0]) == optimizer.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize("order", [("clip", "accumulate"), ("accumulate", "clip")])
def test_the_order_of_the_cfg_is_the_order_of_nesting(order: tuple[str, ...], tmp_path: Path) -> None:
    """accumulate, clip clips the accumulated gradient; clip, accumulate adds up clipped ones: the later entry is outside."""
    entries = {"clip": dict(type="GradClipHook", max_norm=1e-3), "accumulate": dict(type="GradAccumulateHook", n=3)}
    cfg = {**tiny_cfg(tmp_path, **{n: entries[n] for n in order}), "optimizer": dict(type="SGD", lr=1.0)}
    check.check(cfg)
    job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
    assert tuple(h.name for h in at(job.hooks["train"], "grad")) == order
    before = job.state.clone()
    after, logs = job.steps["train"](job.state, next(iter(job.streams["train"].epoch(0))))
    moved = torch.cat([(before.params[n] - p).reshape(-1) for n, p in after.params.items()]).norm()
    if order == ("accumulate", "clip"):
        torch.testing.assert_close(moved, torch.tensor(1e-3), rtol=1e-3, atol=0)  # exactly one clip, around everything
        assert float(logs["grad_norm"].weight) == 1.0
    else:
        assert moved < 0.99e-3  # a mean of three clipped gradients that do not all point one way
        assert float(logs["grad_norm"].weight) == 3.0


def broken(law: str) -> Middleware[Any]:
    """A hook that breaks one law."""
    calls = 0

    def writes(step: Step) -> Step:
        def writing(state: TrainState, batch: Batch) -> Any:
            after, logs = step(state, batch)
            with torch.no_grad():
                state.params["0.bias"].add_(1.0)
            return after, logs

        return writing

    def grows(step: Step) -> Step:
        def growing(state: TrainState, batch: Batch) -> Any:
            after, logs = step(state, batch)
            return after.with_slot("new", after.step), logs

        return growing

    def looks(step: Step) -> Step:
        def looking(state: TrainState, batch: Batch) -> Any:
            after, logs = step(state, batch)
            return after.replace(params={n: (p + state.params[n]) / 2 for n, p in after.params.items()}), logs

        return looking

    def counts(step: Step) -> Step:
        def counting(state: TrainState, batch: Batch) -> Any:
            nonlocal calls
            calls += 1
            after, logs = step(state, batch)
            return after.replace(params={n: p * calls for n, p in after.params.items()}), logs

        return counting

    def zeroes(step: Step) -> Step:
        def zeroing(state: TrainState, batch: Batch) -> Any:
            state, logs = step(state, batch)
            return state.replace(params={n: p * 0 for n, p in state.params.items()}), logs

        return zeroing

    def hides(epoch: Any) -> Any:
        def hiding(state: TrainState, batches: Any) -> Any:
            state, logs = epoch(state, batches)
            return state, Logs(logs.names, logs.packed * 2 + 1)

        return hiding

    def repeats(run: Any) -> Any:
        def again(state: TrainState) -> TrainState:
            begun = state.clone()
            run(state)
            return run(begun)

        return again

    hooks = {
        "leaves its input": Middleware("mine", writes, "step"),
        "keeps the structure": Middleware("mine", grows, "step"),
        "does not look back": Middleware("mine", looks, "step", looks_back=False),
        "compiled equals eager": Middleware("mine", counts, "step"),
        "leaves the state": Middleware("mine", zeroes, "host"),
        "leaves the logs": Middleware("mine", hides, "epoch"),
        "leaves the epochs": Middleware("mine", repeats, "run"),
    }
    return hooks[law]


@pytest.mark.parametrize(
    "law",
    [
        "leaves its input",
        "keeps the structure",
        "does not look back",
        "compiled equals eager",
        "leaves the state",
        "leaves the logs",
        "leaves the epochs",
    ],
)
def test_check_hook_names_the_broken_law(law: str, aot_eager: None) -> None:
    """`check_hook` fails for a hook that breaks a law, and names that law."""
    with pytest.raises(AssertionError, match=law):
        check_hook(broken(law))


def test_a_hook_that_changes_something_is_no_identity() -> None:
    """`check_identity` fails for a hook that does something, and names the first tensor that it reached."""
    with pytest.raises(AssertionError, match=r"changes nothing: params\.0\.weight"):
        check_identity(GradClipHook(max_norm=0.1))


@pytest.mark.nightly
def test_traced_hooks_in_generated_code(tmp_path: Path) -> None:
    """All traced hooks without randomness, one around the other in one graph of generated code, keep the laws."""
    names = ["LabelSmoothingHook", "FreezeHook", "GradStatsHook", "GradClipHook", "GradAccumulateHook", "SAMHook"]
    names += ["SkipNonFiniteHook", "SpikeHook", "LookaheadHook", "EMAHook", "SWAHook"]
    hooks = [h for n in names for h in made(n, tmp_path, **({"policy": "skip"} if n == "SpikeHook" else {}))]
    check_hook([h for h in hooks if h.depth in ("loss", "grad", "step")])
