"""Hooks at the gradient: SAM against a two-pass loop, freezing, gradient statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import info
from tiny import tiny_cfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ailab.config import check
from ailab.core.epoch import epoch_ended
from ailab.core.grad import local_grad
from ailab.errors import ConfigError
from ailab.hooks import FreezeHook, GradAccumulateHook, GradClipHook, GradStatsHook, SAMHook
from ailab.job.assemble import assemble
from ailab.optim import build_optimizer
from ailab.stack import at, stack
from ailab.testing import TinyNet, check_identity
from ailab.types import TrainState


def climbed(model: nn.Module, batch: dict[str, Tensor], rho: float, adaptive: bool) -> list[Tensor]:
    """The gradient of SAM as its authors write it: backward, perturb, backward, restore."""
    params = list(model.parameters())
    first = torch.autograd.grad(cross_entropy(model(batch["input"]), batch["target"]), params)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    scale = [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]
    norm = torch.stack([(s * g).norm() for s, g in zip(scale, first, strict=True)]).norm()
    steps = [s * s * g * rho / (norm + 1e-12) for s, g in zip(scale, first, strict=True)]
    with torch.no_grad():
        for p, e in zip(params, steps, strict=True):
            p.add_(e)
    second = torch.autograd.grad(cross_entropy(model(batch["input"]), batch["target"]), params)
    with torch.no_grad():
        for p, e in zip(params, steps, strict=True):
            p.sub_(e)
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
    return list(second)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_sam_equals_a_two_pass_loop(rho: float, adaptive: bool) -> None:
    """Over 20 steps parameters and running statistics are those of the two-pass loop; BatchNorm moves in the first pass only."""
    net, model = TinyNet([SAMHook(rho, adaptive)]), TinyNet().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state, step = net.state.clone(), net.step()
    for i in range(20):
        batch = net.batches[i % 2]
        for p, g in zip(model.parameters(), climbed(model, batch, rho, adaptive), strict=True):
            p.grad = g
        optimizer.step()
        _, plain = net.loss()(state.params, state.buffers, batch)
        state, logs = step(state, batch)
        assert torch.equal(logs["loss"].total, plain.logs["loss"].total)  # of the first pass
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-4, atol=1e-5)
    for name, b in model.named_buffers():
        torch.testing.assert_close(state.buffers[name], b, rtol=1e-4, atol=1e-5)


def test_sam_without_a_radius_is_the_gradient_itself() -> None:
    """sam(0) returns the gradient function unchanged, as the same object."""
    grad = local_grad(TinyNet().loss())
    assert SAMHook(0.0)(grad) is grad


def test_sam_depends_on_its_place_in_the_list() -> None:
    """Listed after accumulate it perturbs with the whole batch, before it with each micro-batch. So the gradients differ."""
    net = TinyNet()
    net.model[1] = nn.Identity()  # batch norm sees micro-batches
    bare, batch = local_grad(net.loss()), net.batches[0]
    outside, _ = stack(bare, [GradAccumulateHook(3), SAMHook(0.5)])(net.state, batch)
    inside, _ = stack(bare, [SAMHook(0.5), GradAccumulateHook(3)])(net.state, batch)
    whole, _ = SAMHook(0.5)(bare)(net.state, batch)
    parts = [SAMHook(0.5)(bare)(net.state, {k: v[i : i + 2] for k, v in batch.items()})[0] for i in (0, 2, 4)]
    for name in whole:
        torch.testing.assert_close(outside[name], whole[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(inside[name], torch.stack([p[name] for p in parts]).mean(0), rtol=1e-5, atol=1e-6)
    assert any((inside[n] - outside[n]).abs().max() > 1e-3 for n in whole)


def frozen_along(hook: Any, optimizer: str = "SGD", **hyper: Any) -> list[TrainState]:
    """The states along 8 steps."""
    net = TinyNet(hook)
    net.optimizer = build_optimizer(optimizer, net.state.params, lr=0.1, **hyper)
    state = net.state.replace(opt_state=net.optimizer.init(net.state.params)).clone()
    states, step = [state], net.step()
    for i in range(8):
        after, _ = step(states[-1], net.batches[i % 2])
        states.append(epoch_ended(after) if i % 2 == 1 else after)
    return states


def test_frozen_for_the_whole_run_is_not_differentiated(tmp_path: Path) -> None:
    """Matching parameters have no gradient at all, stay bitwise, and keep no optimizer memory; the others train as always."""
    hook = FreezeHook(["0.*", "3.bias"], run=info(tmp_path))
    net = TinyNet(hook)
    grads, _ = local_grad(net.loss())(net.state, net.batches[0])
    assert list(grads) == ["1.weight", "1.bias", "3.weight"]
    states = frozen_along(hook, "AdamW", weight_decay=0.5)
    for name, p in states[0].params.items():
        assert torch.equal(p, states[-1].params[name]) == (name in ("0.weight", "0.bias", "3.bias")), name


@pytest.mark.parametrize(("until", "by", "steps"), [(3, "step", 3), (2, "epoch", 4)])
def test_frozen_for_a_while(until: int, by: Any, steps: int, tmp_path: Path) -> None:
    """Before `until` the parameters are bitwise those of the start, with weight decay too. Then they train as in torch."""
    states = frozen_along(FreezeHook(["0.*"], until, by, run=info(tmp_path)), momentum=0.9, weight_decay=0.1)
    net = TinyNet()
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for i in range(8):
        optimizer.zero_grad()
        cross_entropy(net.model(net.batches[i % 2]["input"]), net.batches[i % 2]["target"]).backward()
        for p in net.model[0].parameters() if i < steps else ():
            p.grad = None
        optimizer.step()
        assert torch.equal(states[i + 1].params["0.weight"], states[0].params["0.weight"]) == (i < steps)
        for name, p in net.model.named_parameters():
            torch.testing.assert_close(states[i + 1].params[name], p.detach(), rtol=1e-4, atol=1e-5)
    assert states[-1].at == 8


def test_statistics_are_those_of_torch() -> None:
    """Norm, largest element and update ratio, of all parameters and of a pattern; listed before clip, of the unclipped gradient."""
    net = TinyNet([*GradStatsHook({"last": "3.*"}), GradClipHook(max_norm=1e-3)])
    grads, _ = local_grad(net.loss())(net.state, net.batches[0])
    after, logs = net.step()(net.state, net.batches[0])
    for suffix, names in (("", list(grads)), ("/last", ["3.weight", "3.bias"])):
        flat = torch.cat([grads[n].flatten() for n in names])
        torch.testing.assert_close(logs[f"grad/norm{suffix}"].value, flat.norm())
        torch.testing.assert_close(logs[f"grad/max{suffix}"].value, flat.abs().max())
        moved = torch.cat([(after.params[n] - net.state.params[n]).flatten() for n in names]).norm()
        size = torch.cat([net.state.params[n].flatten() for n in names]).norm()
        torch.testing.assert_close(logs[f"update/ratio{suffix}"].value, moved / size)
        assert float(logs[f"grad/norm{suffix}"].weight) == 1
    assert set(logs) == {"loss", "grad_norm"} | {
        f"{a}{b}" for a in ("grad/norm", "grad/max", "update/ratio") for b in ("", "/last")
    }
    assert "update/ratio" not in dict(TinyNet(GradStatsHook(update=False)).run(TinyNet(GradStatsHook(update=False)).step())[1])


def test_statistics_of_what_is_frozen_count_nothing(tmp_path: Path) -> None:
    """A pattern whose parameters have no gradient logs a mean over nothing, and an update of zero."""
    net = TinyNet([*FreezeHook(["3.*"], run=info(tmp_path)), *GradStatsHook({"last": "3.*"})])
    _, logs = net.step()(net.state, net.batches[0])
    assert float(logs["grad/norm/last"].weight) == 0
    assert float(logs["update/ratio/last"].total) == 0
    assert float(logs["grad/norm"].total) > 0


@pytest.mark.parametrize("name", ["sam", "stats"])
def test_identity_settings_are_identities(name: str) -> None:
    """sam(0) and statistics leave parameters, buffers and momentum bitwise alone."""
    check_identity([SAMHook(0.0)] if name == "sam" else GradStatsHook())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(type="SAMHook", rho=-0.1), r"cfg\.hooks\.mine\.rho is -0\.1"),
        (dict(type="FreezeHook", params=["frist.*"]), r"cfg\.hooks\.mine\.params\[0\]: no parameter matches 'frist\.\*'"),
        (dict(type="FreezeHook", params=["first.*"], until=0), r"cfg\.hooks\.mine\.until is 0"),
        (dict(type="FreezeHook", params=["*"]), r"there is nothing to train: every parameter is frozen"),
        (dict(type="GradStatsHook", patterns={"enc": "encoder.*"}), r"cfg\.hooks\.mine\.patterns\.enc: no parameter matches"),
        (dict(type="RematHook", modules=["block.*"]), r"cfg\.hooks\.mine\.modules\[0\]: no sub-module matches 'block\.\*'"),
        (dict(type="RematHook", modules=[]), r"cfg\.hooks\.mine\.modules is empty"),
        (dict(type="SAMHook", ro=0.1), r"cfg\.hooks\.mine\.ro: SAMHook takes no 'ro'"),
    ],
)
def test_mistakes_are_named(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A setting or a pattern that makes no sense is a ConfigError with its path, before the first step."""
    cfg = tiny_cfg(tmp_path, mine=entry)
    with pytest.raises(ConfigError, match=message):
        check.check(cfg)
        assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)


def test_a_run_counts_what_it_trains(tmp_path: Path) -> None:
    """Parameters frozen for the whole run are not among those that a run differentiates."""
    cfg = tiny_cfg(tmp_path, mine=dict(type="FreezeHook", params=["first.*"]))
    job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
    assert job.parts.trainable == {"norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert at(job.hooks["train"], "loss")[-1].name == "mine"
