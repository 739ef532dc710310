"""Averages of parameters against torch's own: EMA, SWA, Lookahead; the parameters that are evaluated and those in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import info
from tiny import newest_content, tiny_cfg
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ailab import tree
from ailab.core.epoch import epoch_ended
from ailab.core.step import eval_step
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.hooks import EMAHook, LookaheadHook, SWAHook
from ailab.stack import at, stack
from ailab.testing import TinyNet, check_identity
from ailab.types import TrainState

STEPS = 20


def along(net: TinyNet, average: AveragedModel | None = None, at_steps: Any = ()) -> TrainState:
    """The state after some steps. `average` is updated with the model after the steps `at_steps`, counted from 1."""
    state, step = net.state.clone(), net.step()
    for i in range(1, STEPS + 1):
        state, _ = step(state, net.batches[i % 2])
        state = epoch_ended(state) if i % 2 == 0 else state
        if average is not None and i in at_steps:
            net.model.load_state_dict({**state.params, **state.buffers})
            average.update_parameters(net.model)
    return state


def equal(values: Any, module: nn.Module, *, buffers: bool) -> None:
    for name, p in module.named_parameters():
        torch.testing.assert_close(values[name], p.detach())
    for name, b in module.named_buffers() if buffers else ():
        if b.is_floating_point():  # torch averages counters, too, and rounds
            torch.testing.assert_close(values[name], b)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_ema_equals_torch(use_buffers: bool) -> None:
    """EMAHook without warm-up equals AveragedModel with get_ema_multi_avg_fn, parameters and buffers, averaged or the model's."""
    net = TinyNet(EMAHook(decay=0.9, warmup=False, use_buffers=use_buffers))
    average = AveragedModel(net.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    average.update_parameters(net.model)  # its first update copies
    state = along(net, average, range(1, STEPS + 1))
    equal(state.slots["ema"], average.module, buffers=use_buffers)
    if not use_buffers:
        equal({**state.slots["ema"], **state.buffers}, average.module, buffers=True)
        assert set(state.slots["ema"]) == set(state.params)
    else:
        assert torch.equal(state.slots["ema"]["1.num_batches_tracked"], state.buffers["1.num_batches_tracked"])


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(("start", "every"), [(1, 1), (7, 3), (20, 1)])
def test_swa_equals_torch(start: int, every: int, use_buffers: bool, tmp_path: Path) -> None:
    """SWAHook equals AveragedModel that is updated after `start`, `start + every`, ... steps."""
    hook = SWAHook(start, every, by="step", use_buffers=use_buffers, run=info(tmp_path, total_epochs=STEPS))
    net = TinyNet(hook)
    average = AveragedModel(net.model, use_buffers=use_buffers)
    state = along(net, average, range(start, STEPS + 1, every))
    equal(state.slots["swa"]["mean"], average.module, buffers=use_buffers)
    assert int(state.slots["swa"]["n"]) == int(average.n_averaged)


def test_swa_by_epoch_takes_the_ends_of_epochs(tmp_path: Path) -> None:
    """Of 2 steps an epoch, start=3 and every=2 epochs are the steps 6, 10, 14 and 18."""
    by_epoch = TinyNet(SWAHook(3, 2, run=info(tmp_path, total_epochs=10)))
    by_step = TinyNet(SWAHook(6, 4, by="step", run=info(tmp_path, total_epochs=10)))
    a, b = along(by_epoch), along(by_step)
    assert int(a.slots["swa"]["n"]) == 4
    for (path, x), (_, y) in zip(tree.items(a.slots["swa"]), tree.items(b.slots["swa"]), strict=True):
        assert torch.equal(x, y), path


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (5, 0.8), (6, 0.0), (4, 1.0)])
def test_lookahead_equals_a_plain_loop(k: int, alpha: float) -> None:
    """Parameters and slow weights are those of the algorithm written down as a loop around torch's SGD."""
    net = TinyNet([LookaheadHook(k, alpha)])
    model = TinyNet().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    slow = [p.detach().clone() for p in model.parameters()]
    for i in range(1, STEPS + 1):
        batch = net.batches[i % 2]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["input"]), batch["target"]).backward()
        optimizer.step()
        if i % k == 0:
            with torch.no_grad():
                for s, p in zip(slow, model.parameters(), strict=True):
                    s += alpha * (p - s)
                    p.copy_(s)
    state = along(net)
    for (name, p), s in zip(model.named_parameters(), slow, strict=True):
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state.slots["lookahead"][name], s, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lookahead", "swa", "ema"])
def test_identity_settings_are_identities(name: str, tmp_path: Path) -> None:
    """lookahead(alpha=1), and averages that only watch, leave parameters, buffers and momentum bitwise alone."""
    hooks = {
        "lookahead": [LookaheadHook(k=3, alpha=1.0)],
        "swa": SWAHook(5, run=info(tmp_path, total_epochs=10)),
        "ema": EMAHook(use_buffers=True),
    }[name]
    check_identity(hooks)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["ema", "swa"])
def test_validation_sees_the_average(name: str, use_buffers: bool, tmp_path: Path) -> None:
    """The loss in validation is bitwise that of the average (before SWA has begun: of the parameters); the state comes back."""
    run = info(tmp_path, total_epochs=50)
    hooks = EMAHook(use_buffers=use_buffers) if name == "ema" else SWAHook(30, by="step", use_buffers=use_buffers, run=run)
    late = [] if name == "ema" else SWAHook(3, by="step", use_buffers=use_buffers, run=run)
    for mine, begun in ((hooks, name == "ema"), (late, True)):
        if not mine:
            continue
        net = TinyNet(mine)
        state, bare = along(net), eval_step(net.loss(training=False))
        after, logs = stack(bare, at(net.hooks, "step", "val"))(state, net.batches[0])
        mean = state.slots[name] if name == "ema" else state.slots[name]["mean"]
        held = {n: mean.get(n, b) for n, b in state.buffers.items()}
        other = state.replace(params={n: mean[n] for n in state.params}, buffers=held) if begun else state
        assert torch.equal(logs["loss"].total, bare(other, net.batches[0])[1]["loss"].total)
        assert begun != torch.equal(logs["loss"].total, bare(state, net.batches[0])[1]["loss"].total)
        for (path, x), (_, y) in zip(tree.items(after), tree.items(state), strict=True):
            assert torch.equal(x, y), path


@pytest.mark.parametrize("name", ["ema", "swa", "both", "blind"])
def test_a_checkpoint_has_the_validated_parameters(name: str, tmp_path: Path) -> None:
    """`model_state` loads into the user's module and is the average; `state` has the parameters; with eval=False both do."""
    ema, swa = dict(type="EMAHook", decay=0.9, use_buffers=True), dict(type="SWAHook", start=2)
    entries = {
        "ema": dict(ema=ema),
        "swa": dict(swa=swa),
        "both": dict(ema=ema, swa=swa),  # swa is outside: it hands its state inwards, where ema puts its own in
        "blind": dict(ema={**ema, "eval": False}),
    }[name]
    cfg = tiny_cfg(tmp_path, **entries, checkpoint=dict(type="CheckpointHook"))
    result = fit(cfg)
    content = newest_content(tmp_path)
    slots, model = content["state"]["slots"], result_module()
    model.load_state_dict(content["model_state"])
    if name == "blind":
        wanted = {**content["state"]["params"], **content["state"]["buffers"]}
    else:
        wanted = slots["swa"]["mean"] if name == "swa" else slots["ema"]
        assert any(not torch.equal(p, content["state"]["params"][n]) for n, p in model.named_parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    assert all(torch.equal(p, result.state.params[n]) for n, p in content["state"]["params"].items())


def result_module() -> nn.Module:
    from tiny import Net

    return Net()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda run: LookaheadHook(k=0), r"cfg\.hooks\.lookahead\.k is 0"),
        (lambda run: LookaheadHook(alpha=1.2), r"cfg\.hooks\.lookahead\.alpha is 1\.2"),
        (lambda run: SWAHook(0, run=run), r"cfg\.hooks\.swa: start=0"),
        (lambda run: SWAHook(4, run=run), r"cfg\.hooks\.swa\.start is 4, and the run ends after 3 epochs"),
        (lambda run: SWAHook(7, by="step", run=run), r"the run ends after 6 steps"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str, tmp_path: Path) -> None:
    """A setting that makes no sense is a ConfigError when the hook is built."""
    with pytest.raises(ConfigError, match=message):
        build(info(tmp_path))
