"""The compile line: one graph, donation, replay, and eager as the oracle."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, Points
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import allow_traced_grad, compile, graphs_compiled
from ailab.config import check
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.step import train_step
from ailab.errors import ConfigError, DonatedError
from ailab.job.assemble import assemble
from ailab.optim import build_optimizer, lrs, with_lrs
from ailab.stack import Middleware, at
from ailab.types import Batch, Mean, TrainState


class ScalarLoss(nn.Module):
    """A criterion that returns one number, so no sample of a batch can be masked."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)


def no_drop() -> nn.Module:
    """Batch norm, and no randomness, whose numbers differ between eager and inductor."""
    net = Net()
    net.drop = nn.Identity()
    return net


def row_wise_net() -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 8), act=nn.ReLU(), last=nn.Linear(8, 3)))


def job(
    work_dir: Path, compiled: bool, loss: Any = "CrossEntropyLoss", lines: list[str] | None = None, model: Any = no_drop
) -> Any:
    cfg = dict(
        work_dir=str(work_dir),
        total_epochs=3,
        workflow=[{"phase": "train"}, {"phase": "val"}],
        data=dict(
            train=dict(type=Points, n=50),
            val=dict(type=Points, n=13, seed=1),
            train_dataloader=dict(batch_size=16),  # 16, 16, 16, 2
            val_dataloader=dict(batch_size=8),
        ),
        model=dict(type=model),
        loss=dict(type=loss),
        optimizer=dict(type="SGD", lr=0.05, momentum=0.9),  # Adam blows up the zero gradient of a bias before batch norm
        compile=compiled,
        hooks=dict(
            metrics=dict(type="MetricHook", top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"})),
            clip=dict(type="GradClipHook", max_norm=0.5),
            ema=dict(type="EMAHook", decay=0.9),
            lr_scheduler=dict(type="LrSchedulerHook", by="step", scheduler=dict(type="CosineAnnealingLR", T_max=12)),
        ),
    )
    check.check(cfg)
    return assemble(check.complete(cfg), torch.device("cpu"), say=(lines if lines is not None else []).append)


def graphs(made: Any) -> dict[str, int]:
    return {compiled.name: len(compiled.graphs) for compiled in made.plan.compiled}


@pytest.mark.parametrize(
    ("loss", "model", "count"),
    [("CrossEntropyLoss", row_wise_net, (1, 1)), ("CrossEntropyLoss", no_drop, (2, 1)), (ScalarLoss, no_drop, (2, 2))],
    ids=["row-wise", "batch norm", "scalar"],
)
def test_compiled_equals_eager_in_as_few_graphs_as_there_are_shapes(
    loss: Any, model: Any, count: tuple[int, int], tmp_path: Path
) -> None:
    """Over 3 epochs with a ragged tail: the eager numbers, one graph where padding is masked, else two, the second reported."""
    lines: list[str] = []
    eager, compiled = job(tmp_path / "e", False, loss, model=model), job(tmp_path / "c", True, loss, lines, model)
    before = graphs_compiled()
    a, b = eager.run(eager.state), compiled.run(compiled.state)
    assert graphs(compiled) == dict(zip(("train", "val"), count, strict=True))
    assert graphs_compiled() - before == sum(graphs(compiled).values())
    second = ["train step: compiled graph 2, for a batch with input (2, 4), target (2,)"]
    second += ["val step: compiled graph 2, for a batch with input (5, 4), target (5,)"]
    assert [line for line in lines if "compiled graph" in line] == [s for s, n in zip(second, count, strict=True) if n == 2]
    for (path, x), (_, y) in zip(tree.items(a), tree.items(b), strict=True):
        torch.testing.assert_close(
            x.to(torch.float64), y.to(torch.float64), rtol=1e-4, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
        )


def simple(dropout: float = 0.0, **options: Any) -> tuple[Any, TrainState, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    state = module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1, momentum=0.9)
    step = train_step(local_grad(loss_of(model, nn.CrossEntropyLoss())), optimizer)
    batch = {"input": torch.randn(6, 4), "target": torch.randint(3, (6,))}
    return compile(step, **options), state.replace(opt_state=optimizer.init(state.params)), batch


@pytest.mark.parametrize("enabled", [True, False])
def test_a_donated_state_raises_when_touched(enabled: bool, aot_eager: None) -> None:
    """Reading any field of a consumed state is an error that names the step and the way out."""
    step, state, batch = simple(enabled=enabled)
    middle, _ = step(state, batch)
    step(middle, batch)
    for field in ("step", "params", "buffers", "opt_state", "slots"):
        with pytest.raises(DonatedError, match=r"(?s)after step 2 had consumed.*state\.clone\(\)"):
            getattr(middle, field)


@pytest.mark.parametrize("enabled", [True, False])
def test_without_donation_the_input_is_untouched(enabled: bool, aot_eager: None) -> None:
    """With donate=False a step leaves its input as it was, bitwise, and gives what a donating one gives."""
    step, state, batch = simple(enabled=enabled, donate=False)
    kept = state.clone()
    after, _ = step(state, batch)
    after, _ = step(after, batch)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(kept), strict=True))
    donating, fresh, _ = simple(enabled=enabled)
    fresh, _ = donating(fresh, batch)
    fresh, _ = donating(fresh, batch)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(fresh), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch 2.11 importing its own inductor
@pytest.mark.parametrize("how", ["inductor", "aot_eager", "eager"])
def test_any_step_can_be_replayed(how: str, request: pytest.FixtureRequest) -> None:
    """A step from a kept state gives the same bits again, dropout included; another seed gives others."""
    enabled = how != "eager"
    if how == "aot_eager":
        request.getfixturevalue(how)
    step, state, batch = simple(dropout=0.5, enabled=enabled, seed=3)
    state, _ = step(state, batch)
    kept = state.clone()
    first, _ = step(state, batch)
    first = first.clone()
    torch.rand(5)
    again, _ = step(kept.clone(), batch)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(again), strict=True))
    other, _, _ = simple(dropout=0.5, enabled=enabled, seed=4)
    differs, _ = other(kept, batch)
    assert not all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(differs), strict=True))


def test_a_value_that_moves_inside_the_state_arrives(aot_eager: None) -> None:
    """A step that swaps two slots swaps them, though each is written where the other was."""

    def swap(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        return state.replace(step=state.step + 1, slots={"x": state.slots["y"], "y": state.slots["x"]}), {}

    state = TrainState(torch.zeros((), dtype=torch.int64), {}, {}, {}, {"x": torch.ones(2), "y": torch.zeros(2)})
    step = compile(swap)
    state, _ = step(state, {})
    assert (state.slots["x"].tolist(), state.slots["y"].tolist(), state.at) == ([0, 0], [1, 1], 1)


@pytest.mark.parametrize(
    "seen_from", [lambda p: p.view(-1), lambda p: p.detach().view(-1), lambda p: p.t().t().reshape(-1), lambda p: p.flatten()]
)
def test_a_view_of_an_old_value_arrives(seen_from: Any, aot_eager: None) -> None:
    """A slot that is given a view of the old parameters holds the old values, though the parameters are written first."""

    def shifted(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        slots = {"before": seen_from(state.params["w"])}
        return TrainState(state.step + 1, {"w": state.params["w"] + 1}, {}, {}, slots), {}

    state = TrainState(torch.zeros((), dtype=torch.int64), {"w": torch.zeros(2, 2)}, {}, {}, {"before": torch.zeros(4)})
    step = compile(shifted)
    for i in range(3):
        state, _ = step(state, {})
        assert state.params["w"].tolist() == [[i + 1.0, i + 1.0]] * 2
        assert state.slots["before"].tolist() == [float(i)] * 4


def test_memory_at_two_places_is_refused() -> None:
    """A state that holds one tensor at two places cannot be donated: the error names both; a clone of it can."""
    step, state, batch = simple()
    twice = state.with_slot("slow", state.params)
    with pytest.raises(
        ConfigError, match=r"state\.slots\.slow\.0\.weight and state\.params\.0\.weight.*same memory[\s\S]*clone"
    ):
        step(twice, batch)


def test_fields_that_are_one_tensor_get_a_graph_of_their_own(aot_eager: None) -> None:
    """A batch whose input is its target shares no graph with one where they differ; both give the eager numbers."""
    model = nn.Linear(4, 4)
    state = module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    bare = train_step(local_grad(loss_of(model, nn.MSELoss())), optimizer)
    step, eager = compile(bare, donate=False), compile(bare, enabled=False, donate=False)
    state = state.replace(opt_state=optimizer.init(state.params))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for batch in [{"input": x, "target": x}, {"input": x, "target": y}] * 2:
        a, b = step(state, batch)[0], eager(state, batch)[0]
        for p in a.params:
            torch.testing.assert_close(a.params[p], b.params[p])
    assert len(step.graphs) == 2


@pytest.mark.parametrize("donate", [True, False])
def test_no_change_of_a_value_asks_for_a_graph(donate: bool, aot_eager: None) -> None:
    """Another lr, a kept copy of the state, and a state that began as nn.Parameters all run in the first graph."""
    step, state, batch = simple(donate=donate)
    state = state.replace(params={n: nn.Parameter(p) for n, p in state.params.items()})
    before = graphs_compiled()
    for i in range(4):
        kept = state.clone()
        state, _ = step(state, batch)
        again, _ = step(kept, batch)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(again), strict=True))
        slower = with_lrs(state.opt_state, [lr * 0.5 for lr in lrs(state.opt_state)])
        state = state.replace(opt_state=slower)
        assert float(lrs(state.opt_state)[0]) == 0.1 * 0.5 ** (i + 1)
    assert len(step.graphs) == graphs_compiled() - before == 1


def test_another_layout_gets_another_graph(aot_eager: None) -> None:
    """Batches that differ in shape, stride or dtype are never run by one graph, and each gives the eager numbers."""
    step, state, batch = simple(donate=False)
    eager, _, _ = simple(donate=False, enabled=False)
    x = batch["input"]
    batches = [batch, {**batch, "input": x.t().contiguous().t()}, {k: v[:4] for k, v in batch.items()}]
    for some in [*batches, *batches]:
        a, b = step(state, some)[0], eager(state, some)[0]
        for p in a.params:
            torch.testing.assert_close(a.params[p], b.params[p])
    assert len(step.graphs) == 3


def test_a_step_that_cannot_be_traced_says_so() -> None:
    """A branch on data is one clear ConfigError that names the way out, not a graph break."""

    class Branch(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if input.sum() > 0 else input

    model = Branch(4, 4)
    state = module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    step = compile(train_step(local_grad(loss_of(model, nn.CrossEntropyLoss())), optimizer))
    with pytest.raises(ConfigError, match=r"(?s)cannot be traced as one graph.*compile=False"):
        step(
            state.replace(opt_state=optimizer.init(state.params)), {"input": torch.ones(2, 4), "target": torch.zeros(2).long()}
        )


class Reading(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * input.sum().item()


class Choosing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input[input[:, 0] > 0].sum(0)


@pytest.mark.parametrize("kind", [Reading, Choosing])
def test_what_is_read_from_the_data_is_no_constant(kind: type[nn.Linear], aot_eager: None) -> None:
    """Where a model reads a number of its input, or its input decides a shape, every batch is computed with its own."""
    torch.manual_seed(0)
    model = kind(4, 4)
    state = module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    bare = train_step(local_grad(loss_of(model, nn.CrossEntropyLoss())), optimizer)
    step, eager = compile(bare, donate=False), compile(bare, enabled=False, donate=False)
    state = state.replace(opt_state=optimizer.init(state.params))
    for i in range(3):
        batch = {"input": torch.tensor([[1.0, 2, 3, 4], [i - 1, 5, 6, 7]]), "target": torch.tensor([0, i])}
        a, b = step(state, batch)[0], eager(state, batch)[0]
        for p in a.params:
            torch.testing.assert_close(a.params[p], b.params[p])


def test_the_private_names_exist() -> None:
    """What compile.py uses of torch beyond its public API is still there."""
    assert torch._dynamo.config.trace_autograd_ops is False
    with allow_traced_grad():
        assert torch._dynamo.config.trace_autograd_ops is True
    before = graphs_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert graphs_compiled() == before + 1
    assert torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert torch.compiler.skip_all_guards_unsafe


def test_looking_back_is_what_keeps_a_step_from_donating_early(tmp_path: Path) -> None:
    """In an eager run the update writes in place unless a step hook reads the state it passed on."""
    made = job(tmp_path, False)
    state, memory = made.state, made.state.params["first.weight"].data_ptr()
    batch = next(iter(made.streams["train"].epoch(0)))
    state, _ = made.steps["train"](state, batch)
    assert state.params["first.weight"].data_ptr() == memory
    assert not any(h.looks_back for h in at(made.hooks["train"], "step"))
    assert Middleware("mine", lambda step: step, "step").looks_back
