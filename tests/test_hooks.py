"""The laws of hooks; a hook that is new in ailab.hooks is found by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ailab import tree
from ailab.compile import compile
from ailab.core.grad import local_grad
from ailab.errors import ConfigError, NonFiniteError
from ailab.hooks import AMPHook, EMAHook, GradAccumulateHook, GradClipHook, LrSchedulerHook, SkipNonFiniteHook
from ailab.registry import HOOKS
from ailab.signature import parameters
from ailab.stack import as_hooks, at, stack
from ailab.testing import TinyNet, check_hook
from ailab.types import WEIGHT, RunInfo

ARGUMENTS: dict[str, dict[str, Any]] = {  # what a hook needs, or what makes it do something
    "AMPHook": dict(dtype="bf16"),
    "AugmentHook": dict(ops=[]),
    "GradAccumulateHook": dict(n=3),
    "GradClipHook": dict(max_norm=0.1),
    "LrSchedulerHook": dict(by="step", scheduler=dict(type="StepLR", step_size=1)),
    "LoggerHook": dict(interval=1),
    "MetricHook": dict(top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}, phases=["train"])),
    "TensorboardHook": dict(interval=1),
    "WandbHook": dict(interval=1, init_args=dict(mode="disabled")),
}
OWN = [n for n in HOOKS.names() if HOOKS.get(n).__module__.startswith("ailab.")]


def info(folder: Path) -> RunInfo:
    return RunInfo(
        cfg={"workflow": [{"phase": "train"}], "hooks": {}},
        work_dir=folder,
        device=torch.device("cpu"),
        seed=0,
        rank=0,
        world_size=1,
        total_epochs=3,
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


@pytest.mark.parametrize("hooks", [[GradClipHook(max_norm=float("inf"))], [GradAccumulateHook(1)], SkipNonFiniteHook()])
def test_identity_settings_are_identities(hooks: list[Any]) -> None:
    """clip(inf), accumulate(1) and a skip that has nothing to skip leave parameters, buffers and momentum bitwise alone."""
    bare, mine = TinyNet(), TinyNet(hooks)
    a, b = bare.run(bare.step())[0], mine.run(mine.step())[0]
    for field in ("params", "buffers", "opt_state"):
        for (path, x), (_, y) in zip(tree.items(getattr(a, field)), tree.items(getattr(b, field)), strict=True):
            assert torch.equal(x, y), f"{field}.{path}"


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


def test_the_average_equals_torch() -> None:
    """EMAHook without warm-up equals swa_utils.AveragedModel with get_ema_multi_avg_fn over 20 steps."""
    net = TinyNet(EMAHook(decay=0.9, warmup=False))
    average = torch.optim.swa_utils.AveragedModel(net.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    state, step = net.state.clone(), net.step()
    average.update_parameters(net.model)  # its first update copies
    for i in range(20):
        state, _ = step(state, net.batches[i % 2])
        net.model.load_state_dict({**state.params, **state.buffers})
        average.update_parameters(net.model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(state.slots["ema"][name], p.detach())


@pytest.mark.parametrize("by", ["epoch", "step"])
def test_schedules_equal_torch(by: str, tmp_path: Path) -> None:
    """The rate of every update is the one torch's scheduler had before it, by epoch and by step, bitwise."""
    cfg = dict(type="CosineAnnealingLR", T_max=3)
    net = TinyNet([LrSchedulerHook(cfg, by=by, run=info(tmp_path))])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    state, step = net.state, net.step()
    for i in range(6):
        state, _ = step(state, net.batches[i % 2])
        assert float(state.opt_state["lr"][0]) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        if by == "step" or i % 2 == 1:
            scheduler.step()


def test_only_steps_that_are_not_finite_are_skipped() -> None:
    """A NaN batch changes nothing but the step count and the counter; the steps around it are as without it; ten end the run."""
    net = TinyNet(SkipNonFiniteHook(max_in_a_row=3, every=1))
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
    """Over 60 steps with overflows the fp16 scale, the skips and the parameters are those of torch.amp.GradScaler."""
    hooks = AMPHook("fp16", init_scale=2.0**8, growth_interval=5, run=info(tmp_path))
    net = TinyNet([h for h in hooks if h.depth != "loss"])  # the scale is what is tested; the forward stays float32
    model, scaler = net.model, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    model.load_state_dict({**net.state.params, **net.state.buffers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state, step = net.state.clone(), net.step()
    for i in range(60):
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
