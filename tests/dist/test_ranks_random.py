"""Random numbers on several ranks: the loss draws by rank, and what runs after the reduction draws the same on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import CORES, Net, built, compared, config, traced, trained
from torch import Tensor

from ailab.errors import ConfigError
from ailab.rng import begin_step, drawn_by_rank, end_step
from ailab.stack import Middleware
from ailab.types import TrainState

CPU = torch.device("cpu")


def GradNoise(std: float = 0.05, name: str = "grad_noise") -> Middleware[Any]:
    """Noise on every gradient."""

    def wrap(grad: Any) -> Any:
        def noisy(state: TrainState, batch: Any) -> Any:
            grads, aux = grad(state, batch)
            return {n: g + std * torch.randn_like(g) for n, g in grads.items()}, aux

        return noisy

    return Middleware(name, wrap, "grad")


def Perturbed(std: float = 0.05, name: str = "perturbed") -> Middleware[Any]:
    """The mean of two gradients at random places around the parameters: it draws before, between and after."""

    def wrap(grad: Any) -> Any:
        def averaged(state: TrainState, batch: Any) -> Any:
            found = []
            for _ in range(2):
                moved = {n: p + std * torch.randn_like(p) for n, p in state.params.items()}
                grads, aux = grad(state.replace(params=moved), batch)
                found.append({n: g.clone() for n, g in grads.items()})
            return {n: (g + found[1][n]) / 2 + std * torch.randn_like(g) for n, g in found[0].items()}, aux

        return averaged

    return Middleware(name, wrap, "grad")


def WeightNoise(std: float = 0.05, name: str = "weight_noise") -> Middleware[Any]:
    """Noise on every parameter after the update."""

    def wrap(step: Any) -> Any:
        def noisy(state: TrainState, batch: Any) -> Any:
            state, logs = step(state, batch)
            return state.replace(params={n: p + std * torch.randn_like(p) for n, p in state.params.items()}), logs

        return noisy

    return Middleware(name, wrap, "step")


NOISE = {
    "grad": dict(noise=dict(type=GradNoise)),
    "between gradients": dict(noise=dict(type=Perturbed)),
    "step": dict(noise=dict(type=WeightNoise)),
    "both": dict(noise=dict(type=GradNoise), more=dict(type=WeightNoise)),
    "accumulated": dict(accumulate=dict(type="GradAccumulateHook", n=2), noise=dict(type=GradNoise)),
    "each micro-batch": dict(noise=dict(type=GradNoise), accumulate=dict(type="GradAccumulateHook", n=2)),
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("sync", CORES)
def test_noise_above_the_reduction_is_that_of_one_process(ranks: Any, sync: str, noise: str) -> None:
    """With noise in grad and step hooks, 8 steps of 3 ranks are those of one process (1e-9), and ranks agree bitwise."""
    assert max(compared(ranks, 3, config(24, 12, sync=sync, hooks=NOISE[noise]))) < 1e-9


def Drawn(name: str = "drawn") -> Middleware[Any]:
    """A step hook that keeps what it draws in a slot."""

    def wrap(step: Any) -> Any:
        def drawing(state: TrainState, batch: Any) -> Any:
            state, logs = step(state, batch)
            return state.with_slot(name, torch.rand(64, device=state.step.device)), logs

        return drawing

    return Middleware(name, wrap, "step", lambda state: torch.zeros(64, device=state.step.device))


def masks_of(cfg: dict[str, Any], compiled: bool) -> list[tuple[Any, Any]]:
    """After each step: the numbers that this rank's own forward drew, and those of the step hook."""
    found = []

    def wrap(step: Any) -> Any:
        def seen(state: TrainState, batch: Any) -> Any:
            state, logs = step(state, batch)
            found.append((logs.outputs["mask"][0].tolist(), state.slots["drawn"].tolist()))
            return state, logs

        return seen

    def Seen(name: str = "seen") -> Middleware[Any]:
        return Middleware(name, wrap, "host", core={"outputs": ("mask",)})

    cfg["hooks"]["seen"] = dict(type=Seen)
    run = traced if compiled else trained
    run(cfg)
    return found


class Masks(Net):
    """A model whose second output is its dropout mask."""

    def __init__(self) -> None:
        super().__init__(double=False)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        mask = torch.rand(64, device=input.device)
        return {"output": super().forward(input) * (1 + 0.1 * mask[:4]), "mask": mask.expand(len(input), -1)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sync", CORES)
def test_the_loss_draws_by_rank_and_a_step_hook_alike(ranks: Any, sync: str, compiled: bool) -> None:
    """In a step every rank's forward draws its own numbers, the step hook those of all ranks; no number is drawn twice."""
    cfg = config(16, sync=sync, hooks=dict(drawn=dict(type=Drawn)), compile=compiled, workflow=[{"phase": "train"}])
    cfg |= {"model": dict(type=Masks, output_keys=["output", "mask"])}
    first, second = ranks(2)(masks_of, cfg, compiled)
    again, _ = ranks(2)(masks_of, cfg, compiled)
    assert len(first) == 8
    assert first == again
    assert [hook for _, hook in first] == [hook for _, hook in second]
    drawn = [number for step in first for part in step for number in part] + [x for own, _ in second for x in own]
    assert len(set(drawn)) > 0.999 * len(drawn)


def test_a_step_hook_draws_other_numbers_than_the_forward(ranks: Any) -> None:
    """In one process too: wherever a step is cut, its second half does not draw the numbers of the first again."""
    for compiled in (False, dict(cut="loss"), dict(cut="grad"), dict(cut="step")):
        cfg = config(16, hooks=dict(drawn=dict(type=Drawn)), compile=compiled, workflow=[{"phase": "train"}])
        cfg |= {"model": dict(type=Masks, output_keys=["output", "mask"])}
        [found] = ranks(1)(masks_of, cfg, bool(compiled))
        drawn = [number for step in found for part in step for number in part]
        assert len(set(drawn)) > 0.999 * len(drawn)


def cut_of(cfg: dict[str, Any]) -> tuple[str, str]:
    plan = built(cfg).plan
    return plan.cut, plan.why


def test_one_graph_is_cut_where_both_kinds_of_numbers_are_drawn(ranks: Any) -> None:
    """A graph over ranks has one generator: with dropout and noise it is cut at the gradient, and an explicit "step" is refused."""
    noise, dropout = NOISE["step"], dict(dropout=0.5)
    for hooks, model, cut in (({}, {}, "step"), (noise, {}, "step"), ({}, dropout, "step"), (noise, dropout, "grad")):
        cfg = config(16, model=model, sync="graph", hooks=hooks, compile=True)
        found, why = ranks(2)(cut_of, cfg)[0]
        assert found == cut
        assert ("draw random numbers" in why) == (cut == "grad")
    with pytest.raises(ConfigError, match=r"(?s)cfg\.compile\.cut is 'step', and on several ranks .* leave the cut out"):
        ranks(2)(cut_of, {**cfg, "compile": dict(cut="step")})
    assert ranks(2)(cut_of, {**cfg, "dist": dict(sync="ddp")})[0][0] == "loss"
    assert ranks(1)(cut_of, cfg)[0][0] == "step"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("sync", CORES)
def test_generated_code_keeps_replicas_equal(ranks: Any, sync: str, dropout: float) -> None:
    """With the compiler's own random numbers ranks agree bitwise after each step, with noise in hooks and dropout in the loss."""
    cfg = config(16, model=dict(double=False, dropout=dropout), sync=sync, hooks=NOISE["both"], workflow=[{"phase": "train"}])
    one, two = ranks(2)(trained, {**cfg, "compile": True, "total_epochs": 1})
    assert one["steps"] == two["steps"]
    assert one["bytes"] == two["bytes"]


def numbers(rank: int, calls: int) -> tuple[list[Tensor], Tensor]:
    """What a function draws in each of its calls within a step, and what is drawn around them."""
    own, around = drawn_by_rank(lambda: torch.rand(8), rank), []
    begin_step(CPU, 5, 7)
    try:
        mine = []
        for _ in range(calls):
            mine.append(own())
            around.append(torch.rand(8))
        return mine, torch.cat(around)
    finally:
        end_step()


def test_a_stream_of_each_rank_beside_that_of_all() -> None:
    """Each call draws new numbers, a function of step, rank and call; what is around them is as if there were no calls."""
    (a, around), (b, same) = numbers(0, 3), numbers(1, 3)
    assert torch.equal(around, same)
    begin_step(CPU, 5, 7)
    assert torch.equal(torch.rand(24), around)
    end_step()
    assert all(torch.equal(x, y) for x, y in zip(a, numbers(0, 3)[0], strict=True))
    assert len({x.item() for x in torch.cat([*a, *b, around])}) > 70


def test_outside_a_step_nothing_is_seeded() -> None:
    """Between steps a function that draws by rank draws on from the generator, as any other."""
    own = drawn_by_rank(lambda: torch.rand(8), 1)
    torch.manual_seed(3)
    mine = torch.cat([own(), own()])
    torch.manual_seed(3)
    assert torch.equal(torch.rand(16), mine)
