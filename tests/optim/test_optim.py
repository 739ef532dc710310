"""Optimizers: equal to torch.optim, pure, traceable, and their errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ailab import tree
from ailab.errors import AilabError, CheckpointError, ConfigError
from ailab.optim import build_optimizer, lrs, with_lrs
from ailab.optim.build import torch_classes
from ailab.optim.rows import ROWS, functional
from ailab.optim.state_dict import from_torch_state_dict, torch_state_dict

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.scale": ()}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    ("Adam", {"maximize": True, "fused": False}),
    ("Adam", {"foreach": True, "weight_decay": 0.1}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "foreach": False}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "fused": False, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "foreach": True}),
    ("Adadelta", {"weight_decay": 0.1, "maximize": True}),
    ("Adadelta", {"foreach": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
    ("Adagrad", {"lr_decay": 0.1, "foreach": True}),
    ("Adagrad", {"maximize": True, "fused": False}),
    ("Adamax", {"weight_decay": 0.1}),
    ("Adamax", {"maximize": True, "foreach": True}),
    ("ASGD", {"t0": 3, "lambd": 0.1, "weight_decay": 0.1}),
    ("ASGD", {"t0": 3, "alpha": 0.5, "maximize": True, "foreach": True}),
    ("NAdam", {"weight_decay": 0.1}),
    ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True}),
    ("NAdam", {"foreach": True}),
    ("RAdam", {"weight_decay": 0.1}),
    ("RAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    ("RAdam", {"foreach": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.5, "foreach": True}),
    ("Rprop", {}),
    ("Rprop", {"etas": (0.4, 1.5), "step_sizes": (1e-4, 1.0), "maximize": True}),
    ("Rprop", {"foreach": True}),
    ("Adafactor", {}),
    ("Adafactor", {"weight_decay": 0.1, "maximize": True, "d": 1.5, "eps": (1e-8, 1e-2)}),
    ("Adafactor", {"foreach": True}),
    ("Muon", {}),
    ("Muon", {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}),
]
IDS = [name + "".join(f"-{k}={v}" for k, v in hyper.items()) for name, hyper in SETTINGS]
# One setting of each class for the slower tests.
EACH = list({name: (name, hyper) for name, hyper in reversed(SETTINGS)}.values())


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = {n: s for n, s in SHAPES.items() if len(s) == 2 or name != "Muon"}
    return {n: torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def rates(i: int, count: int = 1) -> list[Tensor]:
    return [torch.tensor(0.01 * (1 + i % 3) * (g + 1), dtype=torch.float64) for g in range(count)]


def torch_optimizer(
    name: str, params: dict[str, Tensor], hyper: dict[str, Any]
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """torch's own, with the implementation that this package chooses on a CPU: fused where there is a kernel."""
    own = [nn.Parameter(p.clone()) for p in params.values()]
    kernel = {"fused": True} if ROWS[name].fused and not {"foreach", "fused"} & set(hyper) else {}
    return getattr(torch.optim, name)(own, **hyper, **kernel), own


def torch_step(theirs: torch.optim.Optimizer, own: list[nn.Parameter], grads: list[Tensor], lr: list[Tensor]) -> None:
    for group, rate in zip(theirs.param_groups, lr, strict=True):
        group["lr"] = float(rate)
    for p, g in zip(own, grads, strict=True):
        p.grad = g.clone()
    theirs.step()


def follow(name: str, hyper: dict[str, Any], dtype: torch.dtype, steps: int, seed: int = 0) -> None:
    params = make(name, dtype, seed)
    theirs, own = torch_optimizer(name, params, hyper)
    opt = build_optimizer(name, params, **hyper)
    state = opt.init(params)
    for i in range(steps):
        grads = make(name, dtype, seed=1000 * seed + i + 1)
        torch_step(theirs, own, list(grads.values()), rates(i))
        with torch.no_grad():
            params, state = opt.update(grads, with_lrs(state, rates(i)), params)
        for p, q in zip(params.values(), own, strict=True):
            assert torch.equal(p, q), (i, p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "hyper"), SETTINGS, ids=IDS)
def test_equals_torch(name: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    """Twelve updates with a changing lr equal torch.optim's, bitwise in the same eager implementation."""
    follow(name, hyper, dtype, 12)


@settings(max_examples=40, deadline=None)
@given(
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.1, 0.999)),
    seed=st.integers(0, 99),
)
def test_adamw_equals_torch_everywhere(**drawn: Any) -> None:
    """AdamW equals torch's for any admissible hyper-parameters, bitwise."""
    follow("AdamW", {k: v for k, v in drawn.items() if k != "seed"}, torch.float32, 10, drawn["seed"])


@settings(max_examples=40, deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.2, 1.0]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sgd_equals_torch_everywhere(**drawn: Any) -> None:
    """SGD equals torch's for any momentum and dampening, bitwise."""
    follow("SGD", {k: v for k, v in drawn.items() if k != "seed"}, torch.float32, 10, drawn["seed"])


def compiled_against_eager(name: str, hyper: dict[str, Any], backend: str, tolerance: float = 1e-6) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    params = make(name)
    opt = build_optimizer(name, params, **hyper)

    def update(grads: Any, state: Any, params: Any) -> Any:
        with torch.no_grad():
            return opt.update(grads, state, params)

    traced = torch.compile(update, backend=counter, fullgraph=True)
    state, other_params, other_state = opt.init(params), params, opt.init(params)
    for i in range(6):
        grads = make(name, seed=i + 1)
        params, state = update(grads, with_lrs(state, rates(i)), params)
        other_params, other_state = traced(grads, with_lrs(other_state, rates(i)), other_params)
    for a, b in zip(tree.leaves([params, state]), tree.leaves([other_params, other_state]), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "hyper"), EACH, ids=[name for name, _ in EACH])
def test_traces_as_one_graph(name: str, hyper: dict[str, Any]) -> None:
    """Every class traces as one graph, is not traced again when lr changes, and equals eager to 1e-6."""
    compiled_against_eager(name, {k: v for k, v in hyper.items() if k not in ("foreach", "fused")}, "aot_eager")


@pytest.mark.parametrize(("name", "hyper"), SETTINGS, ids=IDS)
def test_a_rate_of_zero_moves_nothing(name: str, hyper: dict[str, Any]) -> None:
    """At lr 0, where a warm-up begins and a cosine ends, parameters stay bit for bit, eager and traced.

    Also those whose gradient has always been 0. What comes after is what eager gives.
    """
    torch._dynamo.reset()
    params = make(name)
    opt = build_optimizer(name, params, **hyper)

    def update(grads: Any, state: Any, params: Any) -> Any:
        with torch.no_grad():
            return opt.update(grads, state, params)

    grads = {n: g * (g > 0) for n, g in make(name, seed=1).items()}
    none = [torch.tensor(0.0, dtype=torch.float64)]
    ends = []
    for run in (update, torch.compile(update, backend="aot_eager", fullgraph=True)):
        still, state = run(grads, with_lrs(opt.init(params), none), params)
        if name != "Rprop":  # lr is only where its own rates begin, and they have a least value
            assert all(torch.equal(still[n], params[n]) for n in params)
        ends.append(run(grads, with_lrs(state, rates(0)), still))
    for a, b in zip(tree.leaves(ends[0]), tree.leaves(ends[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_dampened_momentum_traces() -> None:
    """SGD's undamped first momentum is selected inside the graph."""
    compiled_against_eager("SGD", {"momentum": 0.9, "dampening": 0.5, "nesterov": False}, "aot_eager")


@pytest.mark.parametrize("name", ["Adam", "SGD", "RAdam", "Adagrad", "NAdam", "ASGD"])
def test_foreach_traces(name: str) -> None:
    """The list form, which a GPU is given, traces as one graph too; its float32 bias correction costs digits."""
    compiled_against_eager(name, {"foreach": True}, "aot_eager", 1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch 2.11 importing its own inductor
@pytest.mark.parametrize(("name", "hyper"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_inductor_equals_eager(name: str, hyper: dict[str, Any]) -> None:
    """The compiled update equals the eager one to 1e-6."""
    compiled_against_eager(name, hyper, "inductor")


@pytest.mark.parametrize(("name", "hyper"), EACH, ids=[name for name, _ in EACH])
def test_inputs_are_untouched(name: str, hyper: dict[str, Any]) -> None:
    """An update writes to none of its inputs, shares no memory with them, and keeps the state's structure."""
    params, grads = make(name), make(name, seed=1)
    opt = build_optimizer(name, params, **hyper)
    state = opt.init(params)
    for _ in range(2):
        before = tree.clone([params, grads, state])
        with torch.no_grad():
            new_params, new_state = opt.update(grads, state, params)
        for old, now in zip(tree.leaves(before), tree.leaves([params, grads, state]), strict=True):
            assert torch.equal(old, now)
        assert list(new_params) == list(params)
        for (path, a), (other, b) in zip(tree.items(state), tree.items(new_state), strict=True):
            assert (path, a.shape, a.dtype) == (other, b.shape, b.dtype)
        memory = {t.data_ptr() for t in tree.leaves([params, grads, {**state, "lr": 0}]) if isinstance(t, Tensor)}
        news = tree.leaves([new_params, {**new_state, "lr": 0}])
        assert not memory & {t.data_ptr() for t in news if isinstance(t, Tensor)}
        params, state = new_params, new_state


def test_absent_and_frozen_are_untouched() -> None:
    """A frozen parameter and one without a gradient come back as the same tensors, and so does their state."""
    params = make("Adam")
    opt = build_optimizer("Adam", params, frozen={"a.weight"})
    state = opt.init(params)
    assert "a.weight" not in opt.groups[0].names and "a.weight" not in state["exp_avg"]
    with torch.no_grad():
        new, after = opt.update({"a.bias": torch.ones(4)}, state, params)
        same, idle = opt.update({}, state, params)
    assert new["a.weight"] is params["a.weight"] and new["b.weight"] is params["b.weight"]
    assert after["exp_avg"]["b.weight"] is state["exp_avg"]["b.weight"]
    assert not torch.equal(new["a.bias"], params["a.bias"])
    assert all(same[n] is params[n] for n in params) and float(idle["step"]) == 0


@pytest.mark.parametrize("shape", [(3, 2), (4,)])
def test_adafactor_of_matrices_or_vectors_alone_equals_torch(shape: tuple[int, ...]) -> None:
    """Adafactor keeps other memory for matrices than for vectors; where a model has but one kind, nothing is missed."""
    params, own = {"w": torch.ones(shape)}, nn.Parameter(torch.ones(shape))
    opt, theirs = build_optimizer("Adafactor", params, lr=0.1), torch.optim.Adafactor([own], lr=0.1)
    state = opt.init(params)
    for i in range(3):
        own.grad = torch.linspace(-1.0, 1.0 + i, own.numel()).view(shape)
        theirs.step()
        with torch.no_grad():
            params, state = opt.update({"w": own.grad.clone()}, state, params)
        torch.testing.assert_close(params["w"], own.detach())


def test_groups_equal_torch() -> None:
    """Groups by pattern equal torch's groups, bitwise, each with its own lr; the first match wins."""
    params = make("AdamW")
    entries = [{"params": "*.bias", "weight_decay": 0.0}, {"params": ["b.*", "a.bias"], "lr": 0.5, "betas": (0.5, 0.9)}]
    opt = build_optimizer("AdamW", params, param_groups=entries, lr=0.1)
    assert [g.names for g in opt.groups] == [("a.weight",), ("a.bias",), ("b.weight", "b.scale")]
    assert [float(x) for x in lrs(opt.init(params))] == [0.1, 0.1, 0.5]
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    named = [[own[n] for n in g.names] for g in opt.groups]
    overrides: list[dict[str, Any]] = [{}, {"weight_decay": 0.0}, {"lr": 0.5, "betas": (0.5, 0.9)}]
    theirs = torch.optim.AdamW([{"params": p, **o} for p, o in zip(named, overrides, strict=True)], lr=0.1, fused=True)
    state = opt.init(params)
    for i in range(5):
        grads = make("AdamW", seed=i + 1)
        torch_step(theirs, list(own.values()), list(grads.values()), rates(i, 3))
        with torch.no_grad():
            params, state = opt.update(grads, with_lrs(state, rates(i, 3)), params)
    assert all(torch.equal(params[n], own[n]) for n in params)


@pytest.mark.parametrize(("name", "hyper"), EACH, ids=[name for name, _ in EACH])
def test_state_dict_continues_in_torch_and_back(name: str, hyper: dict[str, Any]) -> None:
    """torch continues bitwise from our state dict, and we from torch's."""
    params = make(name)
    theirs, own = torch_optimizer(name, params, hyper)
    opt = build_optimizer(name, params, **hyper, **({"fused": True} if theirs.defaults.get("fused") else {}))
    fresh = opt.init(params)
    theirs.load_state_dict(torch_state_dict(opt, fresh))  # before the first update
    state = fresh
    for i in range(6):
        grads = make(name, seed=i + 1)
        with torch.no_grad():
            params, state = opt.update(grads, with_lrs(state, rates(i)), params)
        if i == 2:
            with torch.no_grad():
                for p, q in zip(own, params.values(), strict=True):
                    p.copy_(q)
            theirs.load_state_dict(torch_state_dict(opt, state))
        elif i > 2:
            torch_step(theirs, own, list(grads.values()), rates(i))
            assert all(torch.equal(p, q) for p, q in zip(params.values(), own, strict=True))
    back = from_torch_state_dict(opt, fresh, theirs.state_dict())
    for (path, a), (other, b) in zip(tree.items(back), tree.items(state), strict=True):
        assert path == other
        assert torch.equal(a, b) or (path == "step" and not ROWS[name].counts)


def test_state_dict_of_other_groups_is_refused() -> None:
    """A state dict whose groups have other sizes is a CheckpointError."""
    params = make("SGD")
    opt = build_optimizer("SGD", params)
    sd = torch.optim.SGD([nn.Parameter(torch.ones(1))]).state_dict()
    with pytest.raises(CheckpointError, match="groups of"):
        from_torch_state_dict(opt, opt.init(params), sd)


def test_every_torch_class_is_known() -> None:
    """The table has a row for each class of torch.optim but the two that are run as they are."""
    assert set(torch_classes()) == {*ROWS, "SparseAdam", "LBFGS"}


@pytest.mark.parametrize("name", list(ROWS))
def test_functional_forms_have_the_expected_lists(name: str) -> None:
    """torch's functional forms still take params, grads, our state lists in our order, and steps where a row says so."""
    expected = ["param", "", *ROWS[name].slots, *ROWS[name].scalars, *(["state_step"] if ROWS[name].counts else [])]
    taken = inspect.signature(functional(name)).parameters.values()
    lists = [p.name.replace("bufs", "buffer") for p in taken if str(p.annotation).lower().startswith("list")]
    assert len(lists) == len(expected)
    assert all(key in listed for key, listed in zip(expected, lists, strict=True)), lists


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023; keeps a running count in its group too."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(m.lerp(p.grad, 1 - group["beta"]).sign(), alpha=group["lr"] / group["count"])
                    m.lerp_(p.grad.mul_(0.5), 0.1)


@pytest.mark.parametrize("cls", [Lion, "SparseAdam"])
def test_other_classes_equal_themselves(cls: Any) -> None:
    """A class with its own step gives the same values through the adapter, bitwise, and leaves the inputs untouched."""
    params = make("Lion")
    own = [nn.Parameter(p.clone()) for p in params.values()]
    opt = build_optimizer(cls, params)
    theirs = (torch.optim.SparseAdam if cls == "SparseAdam" else cls)(own)
    assert not opt.traced
    state, history = opt.init(params), list[Any]()
    for i in range(4):
        grads = make("Lion", seed=i + 1)
        if cls == "SparseAdam":
            grads = {n: g.reshape(SHAPES[n]).to_sparse() for n, g in grads.items() if g.dim()}
        given = [grads.get(n) for n in params]
        for p, g in zip(own, given, strict=True):
            p.grad = None if g is None else g.clone()
        theirs.param_groups[0]["lr"] = float(rates(i)[0])
        theirs.step()
        history.append((state, params))
        with torch.no_grad():
            params, state = opt.update(grads, with_lrs(state, rates(i)), params)
        assert all(torch.equal(p, q) for p, q in zip(params.values(), own, strict=True))
    if cls is Lion:
        again = from_torch_state_dict(opt, opt.init(params), torch_state_dict(opt, state))
        assert torch.equal(again["state"]["a.bias"]["m"], state["state"]["a.bias"]["m"]) and again["groups"][0]["count"] == 4
        state, params = history[1]
        with torch.no_grad():
            params, state = opt.update(make("Lion", seed=2), with_lrs(state, rates(1)), params)
        assert all(torch.equal(p, q) for p, q in zip(params.values(), history[2][1].values(), strict=True))


class Forgetful(Lion):
    """Counts its steps where nobody looks."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, lr)
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        super().step()


class Opaque(Lion):
    """Keeps an object."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = {1, 2}


@pytest.mark.parametrize(
    ("cls", "said"), [(Forgetful, "remembers 'steps' as attributes"), (Opaque, "keeps at '0.a.weight.seen'")]
)
def test_memory_that_no_checkpoint_would_hold_is_refused(cls: Any, said: str) -> None:
    """A class that counts in an attribute of its own, or gathers objects, is refused at its first update, in a sentence."""
    params = make("Lion")
    opt = build_optimizer(cls, params)
    with pytest.raises(ConfigError, match=rf"^cfg\.optimizer\.type: {cls.__name__} {said}"), torch.no_grad():
        opt.update(make("Lion", seed=1), opt.init(params), params)


def test_hyper_parameters_of_other_classes_are_those_of_the_cfg() -> None:
    """What a class changes in its groups is memory; what it leaves alone is what it was built with, in a resumed run too."""
    params = make("Lion")
    one, other = (build_optimizer(Lion, params, beta=beta) for beta in (0.9, 0.5))
    with torch.no_grad():
        _, state = one.update(make("Lion", seed=1), one.init(params), params)
        assert state["groups"] == [{"count": 1}]
        same, _ = one.update(make("Lion", seed=2), state, params)
        new, _ = other.update(make("Lion", seed=2), state, params)
    assert any(not torch.equal(new[n], same[n]) for n in params)


def test_lbfgs_takes_any_layout() -> None:
    """A gradient in channels_last gives the update of one in rows, where torch's own class fails."""
    start, end = torch.zeros(2, 3, 2, 2), torch.arange(24.0).view(2, 3, 2, 2)
    found: list[Tensor] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        params = {"w": start.to(memory_format=layout)}
        opt = build_optimizer("LBFGS", params, lr=0.5, max_iter=4)
        assert opt.closure_update is not None

        def evaluate(values: dict[str, Tensor], layout: torch.memory_format = layout) -> tuple[Tensor, dict[str, Tensor]]:
            off = values["w"] - end
            return off.square().sum() / 2, {"w": off.to(memory_format=layout)}

        found.append(opt.closure_update(evaluate, opt.init(params), params)[0]["w"])
    assert torch.equal(*found) and not torch.equal(found[0], start)


def test_lbfgs_equals_torch() -> None:
    """LBFGS through closure_update equals torch's, bitwise, over several steps; plain update says what to call."""
    params = {"w": torch.tensor([3.0, -2.0])}
    opt = build_optimizer("LBFGS", params, lr=0.5, max_iter=4)
    own = nn.Parameter(params["w"].clone())
    theirs = torch.optim.LBFGS([own], lr=0.5, max_iter=4)

    def loss(w: Tensor) -> Tensor:
        return (1 - w[0]) ** 2 + 10 * (w[1] - w[0] ** 2) ** 2

    def evaluate(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        w = values["w"].requires_grad_()
        out = loss(w)
        return out.detach(), {"w": torch.autograd.grad(out, w)[0]}

    def closure() -> Tensor:
        theirs.zero_grad()
        out = loss(own)
        out.backward()
        return out

    assert opt.closure_update is not None
    state = opt.init(params)
    for _ in range(4):
        theirs.step(closure)  # pyright: ignore[reportArgumentType]
        before = params["w"].clone()
        new, state = opt.closure_update(evaluate, state, params)
        assert torch.equal(new["w"], own) and torch.equal(before, params["w"])
        params = new
    with pytest.raises(AilabError, match="closure_update"):
        opt.update({}, state, params)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        ("AdamX", {}, r"cfg\.optimizer\.type: 'AdamX' is not an optimizer\. Did you mean 'Adam"),
        ("Adam", {"weight_decey": 0.1}, r"cfg\.optimizer\.weight_decey: Adam takes no.* Did you mean 'weight_decay'"),
        ("Adam", {"lr": -1.0}, r"cfg\.optimizer: Adam refuses.*Invalid learning rate"),
        ("SGD", {"nesterov": True}, r"cfg\.optimizer: SGD refuses.*Nesterov"),
        ("Adam", {"fused": True, "foreach": True}, r"cfg\.optimizer: Adam refuses"),
        ("Adam", {"differentiable": True}, r"cfg\.optimizer\.differentiable"),
        ("Muon", {}, r"cfg\.optimizer: Muon refuses.*2D"),
        ("Adam", {"frozen": set(SHAPES)}, r"no parameter to train"),
        (
            "Adam",
            {"param_groups": [{"params": "*.bais"}]},
            r"cfg\.optimizer\.param_groups\[0\]\.params: '\*\.bais'.* mean 'a\.bias'",
        ),
        ("Adam", {"param_groups": [{"params": "a.*"}, {"params": "a.bias"}]}, r"param_groups\[1\]\.params: earlier"),
        (
            "Adam",
            {"param_groups": [{"params": "a.*", "lrr": 1}]},
            r"param_groups\[0\]\.lrr: Adam takes no 'lrr'\. Did you mean 'lr'",
        ),
        ("Adam", {"param_groups": [{"lr": 1.0}]}, r"param_groups\[0\]\.params: expected"),
        ("Adam", {"param_groups": [{"params": "a.*", "eps": -1}]}, r"param_groups\[0\]: Adam refuses.*epsilon"),
    ],
)
def test_mistakes_are_named(cls: str, kwargs: dict[str, Any], message: str) -> None:
    """A mistake in the cfg is a ConfigError that says where, what came and what would do."""
    with pytest.raises(ConfigError, match=message):
        build_optimizer(cls, make("Adam"), **kwargs)
