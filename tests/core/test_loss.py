"""The bare loss: a module as a pure function, and what a criterion may return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_cfg
from torch import Tensor, nn
from torch.nn import functional

from ailab import tree
from ailab.build import loss_of
from ailab.config import check
from ailab.core.criterion import as_mean
from ailab.core.loss import Functional, module_state, state_dict_of
from ailab.errors import ConfigError
from ailab.job.assemble import assemble
from ailab.types import WEIGHT, Batch, Mean, batch_size


class Tied(nn.Module):
    """Two layers share a weight, and one module is reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.again = self.encode

    def forward(self, input: Tensor) -> Tensor:
        return self.again(self.decode(self.encode(input)))


class Buffered(nn.Module):
    """One buffer is written to, one is assigned to, and one is not part of the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        self.count.add_(1)
        self.average = 0.9 * self.average + 0.1 * self.linear(input).mean(0)
        return self.linear(input) * self.scale + self.average


class Recurrent(nn.Module):
    """An LSTM keeps a flat list of its parameters beside their names."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.lstm(input.unsqueeze(1))[0].squeeze(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "lstm": Recurrent,
    "tied": Tied,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    "buffers": Buffered,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def apply(model: nn.Module, x: Tensor, training: bool, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the buffers of two calls of the functional form, each under its own seed."""
    function, state = Functional(model, training=training), module_state(model)
    key = next(iter(dict(bound(model))))
    call = torch.compile(lambda p, b, v: (function(p, b, {key: v}), b), fullgraph=True) if compiled else None
    buffers, out = tree.clone(state.buffers), x
    for i in range(2):
        torch.manual_seed(i)
        with torch.no_grad():
            if call is None:
                out = function(state.params, buffers, {key: x})
            else:
                out, buffers = call(state.params, dict(buffers), x)
    return out, buffers


def bound(model: nn.Module) -> list[tuple[str, str]]:
    import inspect

    return [(name, name) for name in inspect.signature(model.forward).parameters]


CASES = [(name, training, compiled) for name in MODELS for training in (True, False) for compiled in (False, True)]


@pytest.mark.parametrize(("name", "training", "compiled"), [c for c in CASES if c[0] != "lstm" or not c[2]])
def test_functional_equals_the_module(name: str, training: bool, compiled: bool, aot_eager: None) -> None:
    """The functional form of a module gives its output and its new buffers, bitwise, and leaves the module's tensors alone."""
    model, x = build(name), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    before = tree.clone(dict(model.state_dict(keep_vars=True)))
    out, buffers = apply(model, x, training, compiled)
    assert {m.training for m in model.modules()} == {training}
    for key, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[key]), key
    model.train(training)
    expected = x
    for i in range(2):
        torch.manual_seed(i)
        with torch.no_grad():
            expected = model(x)
    assert torch.equal(out, expected)
    assert list(buffers) == [n for n, _ in model.named_buffers()]
    for key, value in model.named_buffers():
        assert torch.equal(buffers[key], value), key


def test_dynamo_refuses_an_lstm() -> None:
    """Dynamo does not trace torch's RNN modules: that is why the table above has no such case. Add it when this fails."""
    with pytest.raises(torch._dynamo.exc.Unsupported):  # each version has words of its own
        apply(build("lstm"), torch.ones(2, 4), True, True)


def test_a_train_and_an_eval_form_stand_side_by_side() -> None:
    """Two forms of one module do not disturb each other's mode, nor hold tensors of their own."""
    model = build("dropout")
    state, x = module_state(model), torch.ones(64, 4)
    train, evaluate = Functional(model, training=True), Functional(model, training=False)
    with torch.no_grad():
        dropped, whole = train(state.params, {}, {"input": x}), evaluate(state.params, {}, {"input": x})
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
    assert torch.equal(whole, model[0](x))  # type: ignore[index]


def test_the_module_is_whole_after_an_error() -> None:
    """A call that raises leaves nothing behind: the module has its own tensors, and the next call gives what it should."""
    model = build("batchnorm")
    own = list(model.parameters())
    function, state = Functional(model, training=False), module_state(model)
    with pytest.raises(RuntimeError):
        function(state.params, dict(state.buffers), {"input": torch.ones(2, 5)})
    with torch.no_grad():
        out = function(state.params, dict(state.buffers), {"input": torch.ones(2, 4)})
        assert torch.equal(out, model.eval()(torch.ones(2, 4)))
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


@pytest.mark.parametrize("name", list(MODELS))
def test_state_dict_of_loads_strictly(name: str) -> None:
    """A state under the user's names loads strictly into a new module, which then computes the same."""
    model = build(name)
    state = module_state(model)
    state = state.replace(params={n: p.detach() + 0.5 for n, p in state.params.items()})
    named = state_dict_of(model)(state)
    assert list(named) == list(model.state_dict())
    other = build(name)
    other.load_state_dict(named, strict=True)
    x, key = torch.ones(8, 4), bound(model)[0][0]
    with torch.no_grad():
        torch.manual_seed(0)
        expected = Functional(model, training=False)(state.params, dict(state.buffers), {key: x})
        assert torch.equal(other.eval()(x), expected)


def test_parameters_of_a_criterion_have_a_prefix() -> None:
    """A criterion's tensors are in the state under "loss.", take part in the loss, and must not meet a sub-module's."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.seen += 1
            return self.scale * (output - target).square().mean(1)

    model, criterion = nn.Linear(4, 4), Scaled()
    state = module_state(model, criterion)
    assert [*state.params, *state.buffers] == ["weight", "bias", "loss.scale", "loss.seen"]
    batch = {"input": torch.ones(2, 4), "target": torch.zeros(2, 4)}
    total, aux = loss_of(model, criterion)(state.params, state.buffers, batch)
    torch.testing.assert_close(total / aux.weight, 3 * model(batch["input"]).square().mean())
    assert float(aux.buffers["loss.seen"]) == 1.0
    assert float(state.buffers["loss.seen"]) == 0.0
    with pytest.raises(ConfigError, match=r"cfg\.model: the model has a sub-module 'loss'"):
        module_state(nn.ModuleDict({"loss": nn.Linear(1, 1)}), criterion)


# What a criterion may return.


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scalar": lambda output, target: per_sample(output, target).mean(),
    "per_sample": per_sample,
    "mean": lambda output, target: Mean(per_sample(output, target).sum(), torch.tensor(float(len(output)))),
    "dict": lambda output, target: {"a": 0.25 * per_sample(output, target), "b": 0.75 * per_sample(output, target).mean()},
}


def data(size: int = 6) -> Batch:
    gen = torch.Generator().manual_seed(3)
    return {"input": torch.randn(size, 4, generator=gen), "target": torch.randn(size, 4, generator=gen)}


@pytest.mark.parametrize("kind", list(RESULTS))
def test_every_kind_of_result_is_the_same_mean(kind: str) -> None:
    """A scalar, per-sample values, a Mean and a dict of parts that add up give the same total, weight and log."""
    model, batch = build("batchnorm"), data()
    state = module_state(model)
    total, aux = loss_of(model, RESULTS[kind])(state.params, state.buffers, batch)
    plain = per_sample(build("batchnorm")(batch["input"]), batch["target"]).mean()
    torch.testing.assert_close(total, plain * 6, rtol=1e-6, atol=1e-6)
    assert float(aux.weight) == 6.0
    torch.testing.assert_close(aux.logs["loss"].value, plain.detach(), rtol=1e-6, atol=1e-6)
    assert not any(t.requires_grad for m in aux.logs.values() for t in (m.total, m.weight))
    assert not aux.outputs["output"].requires_grad
    if kind == "dict":
        assert list(aux.logs) == ["loss", "a", "b"]
        torch.testing.assert_close(aux.logs["a"].value, plain.detach() / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())], ids=["linear", "mlp"])
@pytest.mark.parametrize(
    "criterion",
    [
        per_sample,
        lambda output, target: {"a": per_sample(output, target), "b": 2 * per_sample(output, target)},
        nn.MSELoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 4.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
    ids=["per_sample", "dict", "mse", "weighted_ce", "smoothed_ce"],
)
def test_samples_of_weight_zero_do_not_matter(model: nn.Module, criterion: Any) -> None:
    """Whatever stands in samples of weight 0, total, weight, logs and gradient are those of the other samples alone."""
    batch, loss = data(), loss_of(model, criterion)
    state = module_state(model, criterion if isinstance(criterion, nn.Module) else None)
    if isinstance(criterion, nn.CrossEntropyLoss):
        batch["target"] = torch.tensor([0, 3, 1, 2, 2, 0])
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    noise = {n: torch.where((weight > 0).view(-1, *[1] * (v.dim() - 1)), v, v.flip(0)) for n, v in batch.items()}

    def result(batch: Batch) -> list[Tensor]:
        total, aux = loss(state.params, state.buffers, batch)
        grads = torch.autograd.grad(total / aux.weight, list(state.params.values()))
        return [total, aux.weight, *grads, *(t for m in aux.logs.values() for t in (m.total, m.weight))]

    alone = {n: v[weight > 0] for n, v in batch.items()}
    padded, other, expected = result({**batch, WEIGHT: weight}), result({**noise, WEIGHT: weight}), result(alone)
    for a, b, c in zip(padded, other, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_a_batch_in_which_nothing_counts_is_zero() -> None:
    """With all weights 0 total, weight and the logged value are 0."""
    model, batch = nn.Linear(4, 4), {**data(), WEIGHT: torch.zeros(6)}
    state = module_state(model)
    for criterion in (per_sample, nn.MSELoss(), lambda output, target: {"a": per_sample(output, target)}):
        total, aux = loss_of(model, criterion)(state.params, state.buffers, batch)
        assert [total.item(), aux.weight.item(), aux.logs["loss"].value.item()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("shape", "said"), [((6, 1), r"\(6, 1\)"), ((5,), r"\(5,\)"), ((6, 4), r"\(6, 4\)"), ((1,), r"\(1,\)")]
)
def test_a_loss_of_another_shape_is_refused(shape: tuple[int, ...], said: str) -> None:
    """A criterion that returns neither a scalar nor one value per sample is refused, with the shape and what would do."""
    model, batch = nn.Linear(4, 4), data()
    state = module_state(model)
    with pytest.raises(ConfigError, match=rf"cfg\.loss: .* shape {said}[\s\S]*per sample \(6,\)"):
        loss_of(model, lambda output, target: torch.zeros(shape))(state.params, state.buffers, batch)


@pytest.mark.parametrize("result", [None, 1.0, [torch.ones(6)]])
def test_a_loss_that_is_no_tensor_is_refused(result: Any) -> None:
    """A criterion that returns something else than tensors is refused by name."""
    with pytest.raises(ConfigError, match=f"cfg.loss: the criterion returned {type(result).__name__}"):
        as_mean(result, data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_losses_are_summed_in_float32(dtype: torch.dtype) -> None:
    """A loss in a half becomes a float32 total, so that a batch of 301 keeps its count and cannot overflow."""
    batch = {"input": torch.zeros(301, 4)}
    for value in (torch.tensor(300.0, dtype=dtype), torch.full((301,), 300.0, dtype=dtype)):
        mean = as_mean(value, batch)
        assert (float(mean.total), float(mean.weight)) == (301 * 300.0, 301.0)


def test_a_model_can_give_the_loss_itself() -> None:
    """Without a criterion the model's output "loss" is the loss, and its other outputs are there by name."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
            output = self.linear(input)
            return {"output": output, "loss": functional.mse_loss(output, target)}

    model, batch = Own(), data()
    state = module_state(model)
    total, aux = loss_of(model, None)(state.params, state.buffers, batch)
    torch.testing.assert_close(total / aux.weight, model(**batch)["loss"])
    assert set(aux.outputs) == {"output", "loss"}


def test_the_buffers_given_are_not_written_to() -> None:
    """A forward that writes to buffers gets copies; the new values come out in `aux.buffers`."""
    model, batch = build("buffers"), data()
    state = module_state(model)
    before = tree.clone(state.buffers)
    _, aux = loss_of(model, per_sample)(state.params, state.buffers, batch)
    for name, value in state.buffers.items():
        assert torch.equal(value, before[name])
    assert int(aux.buffers["count"]) == 1
    assert not torch.equal(aux.buffers["average"], before["average"])
    assert not aux.buffers["average"].requires_grad


def test_batch_size_is_that_of_the_first_tensor_with_samples() -> None:
    """Texts and 0-d tensors have no samples; the first tensor that has says how many there are."""
    assert batch_size({"name": ["a"], "scale": torch.tensor(1.0), "input": torch.zeros(5, 2), "other": torch.zeros(3)}) == 5


@pytest.mark.parametrize(
    ("kind", "pads"), [("per_sample", True), ("scalar", False), ("mean", False), ("dict", False), ("dict_per_sample", True)]
)
def test_padding_is_for_losses_that_mask_it(kind: str, pads: bool, tmp_path: Path) -> None:
    """A run pads its last batch only where nothing shows of it: neither in a loss, nor in the model, which has BatchNorm."""
    results = {**RESULTS, "dict_per_sample": lambda output, target: {"a": per_sample(output, target)}}
    criterion = results[kind]
    with_classes = lambda output, target: criterion(output, functional.one_hot(target, 3).float())
    cfg = {**tiny_cfg(tmp_path), "loss": dict(type=lambda: with_classes)}
    check.check(cfg)
    assert assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None).parts.pad == {"train": False, "val": pads}
