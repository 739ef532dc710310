"""What is proven on the first samples: the pure loss is the user's own module, and padding is where it cannot be seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ailab import Mean, Sum
from ailab.build import loss_of
from ailab.core.loss import module_state
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.job.proof import row_wise
from ailab.types import Batch

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(22, 2, generator=torch.Generator().manual_seed(1))


class Pairs(Dataset[Any]):
    """22 points with two targets, in their order."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.make()

    def make(self) -> None:
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.b(self.a(input).tanh())


# Modules that reach their tensors through attributes of themselves, in every way that people do.


class Lora(TwoLayers):
    """An adapter in a forward hook that closes over `self`."""

    def make(self) -> None:
        super().make()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.a.register_forward_hook(lambda module, given, out: out + self.up(self.down(given[0])))


class Activation(TwoLayers):
    """A lambda over a parameter of `self`."""

    def make(self) -> None:
        super().make()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.act = lambda x: torch.tanh(self.scale * x)

    def forward(self, input: Tensor) -> Tensor:
        return self.b(self.act(self.a(input)))


class Features(TwoLayers):
    """A hook that keeps what a later layer reads."""

    def make(self) -> None:
        super().make()
        self.features: Any = None
        self.a.register_forward_hook(self.keep)

    def keep(self, module: Any, given: Any, out: Tensor) -> None:
        self.features = out

    def forward(self, input: Tensor) -> Tensor:
        self.a(input)
        return self.b(self.features.tanh())


class OldWeightNorm(TwoLayers):
    def make(self) -> None:
        super().make()
        with pytest.warns(FutureWarning):
            self.a = nn.utils.weight_norm(self.a)


class Pruned(TwoLayers):
    def make(self) -> None:
        super().make()
        nn.utils.prune.l1_unstructured(self.a, "weight", 0.5)


class OldSpectralNorm(TwoLayers):
    def make(self) -> None:
        super().make()
        self.a = nn.utils.spectral_norm(self.a)


class OwnCheckpoint(TwoLayers):
    """A model that computes a part of itself again in the backward."""

    def make(self) -> None:
        self.a, self.b = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.b(checkpoint(self.a, input, use_reentrant=False))


class MaskedGradient(TwoLayers):
    """The first rows are pretrained, and a hook on the parameter keeps them."""

    def make(self) -> None:
        super().make()
        mask = torch.zeros(8, 1)
        mask[4:] = 1
        self.a.weight.register_hook(lambda grad: grad * mask)


class Child(nn.Module):
    """Holds its parent outside of the modules."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.__dict__["parent"] = parent
        self.lin = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.parent.scale  # type: ignore[attr-defined]


class BackReference(TwoLayers):
    def make(self) -> None:
        self.a, self.scale, self.b = nn.Linear(4, 8), nn.Parameter(torch.tensor(0.7)), Child(self)


SERVED = [Lora, Activation, Features, OldWeightNorm, Pruned, OldSpectralNorm, OwnCheckpoint, MaskedGradient, BackReference]


def run(work_dir: Path, model: Any, loss: Any = "MSELoss", **more: Any) -> Any:
    cfg = dict(
        work_dir=str(work_dir),
        total_epochs=2,
        data=dict(train=dict(type=Pairs), train_dataloader=dict(batch_size=8, shuffle=False)),
        model=dict(type=model),
        loss=loss if isinstance(loss, dict) else dict(type=loss),
        optimizer=dict(type="SGD", lr=0.1),
        compile=False,
    )
    return fit({**cfg, **more})


def trained(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss, epochs: int = 2) -> nn.Module:
    """The same in plain torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return model


def distance(result: Any, model: nn.Module) -> float:
    params = dict(model.named_parameters())
    assert list(params) == list(result.state.params)
    return max(float((result.state.params[n] - p).detach().abs().max()) for n, p in params.items())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", SERVED, ids=lambda c: c.__name__)
def test_a_module_trains_as_plain_torch_does(model: Any, compiled: bool, tmp_path: Path, aot_eager: None) -> None:
    """Closures, hooks, old parametrizations, own checkpointing, hooks on parameters: the parameters of plain torch, 1e-5."""
    assert distance(run(tmp_path, model, compile=compiled), trained(model())) < 1e-5


@pytest.mark.parametrize("model", [Activation, Lora, MaskedGradient], ids=lambda c: c.__name__)
@pytest.mark.parametrize("how", ["resumed", "not in place"])
def test_so_it_does_when_the_tensors_are_others(model: Any, how: str, tmp_path: Path) -> None:
    """After a resume, and beside a hook that keeps the old state, the module is still called with the state's tensors."""
    if how == "resumed":
        hooks = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
        run(tmp_path, model, hooks=hooks, total_epochs=1)
    else:
        hooks = dict(skip=dict(type="SkipNonFiniteHook"))
    assert distance(run(tmp_path, model, hooks=hooks), trained(model())) < 1e-5


# Modules that cannot be a pure function of their tensors.


class ListOfParameters(TwoLayers):
    def make(self) -> None:
        super().make()
        self.weights = [self.a.weight, self.b.weight]

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.weights[0].T).tanh() @ self.weights[1].T


class ListOfBuffers(TwoLayers):
    def make(self) -> None:
        super().make()
        self.register_buffer("mix", torch.randn(8, 8))
        self.buffers_ = [self.mix]

    def forward(self, input: Tensor) -> Tensor:
        return self.b((self.a(input) @ self.buffers_[0]).tanh())


class Counter(TwoLayers):
    """KL annealing: a number that grows with each forward."""

    def make(self) -> None:
        super().make()
        self.steps = 0

    def forward(self, input: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(input) * min(1.0, self.steps / 10)


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls[0] += 1
        return functional.mse_loss(output, target)


class Late(TwoLayers):
    """A hook for gradients accumulated in the parameter, where none are."""

    def make(self) -> None:
        super().make()
        self.a.weight.register_post_accumulate_grad_hook(lambda p: None)


REFUSED = {
    "list of parameters": (
        ListOfParameters,
        "MSELoss",
        r"cfg\.model: .* pure function .*\n  The module reaches a\.weight, b\.weight",
    ),
    "list of buffers": (ListOfBuffers, "MSELoss", r"reaches mix by another way"),
    "counter": (Counter, "MSELoss", r"cfg\.model: a forward changes the attribute 'steps', from . to .[\s\S]*register_buffer"),
    "counter of a loss": (TwoLayers, CountingLoss, r"cfg\.loss: a forward changes the attribute 'calls'"),
    "late hook": (Late, "MSELoss", r"register_post_accumulate_grad_hook"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_function_of_its_tensors_is_refused(case: str, tmp_path: Path) -> None:
    """A difference from the module itself is an error before the first step that names the tensor or the attribute."""
    model, loss, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, model, loss)
    assert not list(tmp_path.iterdir())


def test_the_module_keeps_its_values() -> None:
    """The proof leaves the user's module with the values that it had, bit for bit, and without gradients."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    from ailab.binding import bind
    from ailab.job.proof import Itself, prove_pure

    batch = {"input": X[:4], "target": Y[:4]}
    criterion = nn.MSELoss()
    itself = Itself(model, bind(model, {}, "m"), criterion, bind(criterion, {"input": "output"}, "l"), ("output",))
    prove_pure(itself, loss_of(model, criterion), module_state(model), batch, training=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Padding.


def info_nce(output: Tensor, target: Tensor) -> Tensor:
    """Per sample, and over the other samples of the batch."""
    return functional.cross_entropy(output @ functional.pad(target, (0, 0)).T, torch.arange(len(output)), reduction="none")


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) < 0.5) if self.training else x


def net(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 8), **{f"m{i}": m for i, m in enumerate(middle)}, b=nn.Linear(8, 2)))


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


ROW_WISE: dict[str, tuple[Any, Any, bool, bool]] = {
    "per sample": (net(), per_sample, True, True),
    "torch": (net(), nn.MSELoss(), True, True),
    "sum": (net(), nn.MSELoss(reduction="sum"), True, True),
    "dropout": (net(nn.Dropout(0.5), nn.Dropout(0.5)), per_sample, True, True),
    "drop path": (net(DropPath(), DropPath()), per_sample, True, True),
    "attention": (
        nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0.3, batch_first=True), nn.Flatten(), nn.Linear(4, 2)
        ),
        per_sample,
        True,
        True,
    ),
    "layer norm": (net(nn.LayerNorm(8)), per_sample, True, True),
    "batch norm": (net(nn.BatchNorm1d(8)), per_sample, False, True),
    "scalar": (net(), lambda output, target: functional.mse_loss(output, target), False, False),
    "scalar sum": (net(), lambda output, target: Sum((output - target).square().sum()), False, False),
    "contrastive": (net(), info_nce, False, False),
    "part of it": (
        net(),
        lambda output, target: {"a": per_sample(output, target), "b": info_nce(output, target)},
        False,
        False,
    ),
    "deaf mean": (net(), lambda output, target: Mean(output.square().sum(), torch.tensor(float(len(output)))), False, False),
}


@pytest.mark.parametrize("case", list(ROW_WISE))
def test_only_what_is_row_wise_is_padded(case: str) -> None:
    """Padding is masked where loss, weight, logs, buffers and outputs of the first rows do not depend on the others."""
    model, criterion, training, evaluating = ROW_WISE[case]
    batch: Batch = {"input": X[:4], "target": Y[:4]}
    state = module_state(model)
    for mode, expected in ((True, training), (False, evaluating)):
        assert row_wise(loss_of(model, criterion, training=mode), state, batch) is expected, mode


def test_the_last_batch_of_a_contrastive_loss_has_no_padding(tmp_path: Path) -> None:
    """InfoNCE per sample over 22 = 8 + 8 + 6 samples trains as plain torch does on batches of 8, 8 and 6."""
    result = run(tmp_path, TwoLayers, dict(type=info_nce))
    assert distance(result, trained(TwoLayers(), lambda a, b: info_nce(a, b).mean())) < 1e-6


class Normed(TwoLayers):
    def make(self) -> None:
        super().make()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, input: Tensor) -> Tensor:
        return self.b(self.norm(self.a(input)).tanh())


def test_batch_norm_sees_no_padding(tmp_path: Path) -> None:
    """With a short last batch parameters and running statistics are those of plain torch."""
    result, right = run(tmp_path, Normed), trained(Normed())
    assert distance(result, right) < 1e-6
    for n, b in right.named_buffers():
        torch.testing.assert_close(result.state.buffers[n], b)


def test_a_last_batch_that_the_model_fails_on_is_found_first(tmp_path: Path) -> None:
    """BatchNorm and one sample: an error before the first step, with the way out."""
    loader = dict(batch_size=7, shuffle=False)
    data = dict(train=dict(type=Pairs), train_dataloader=loader)
    with pytest.raises(ConfigError, match=r"cfg\.data\.train: the last batch has 1 sample[\s\S]*drop_last=True"):
        run(tmp_path, Normed, data=data)
    loader["drop_last"] = True
    assert run(tmp_path, Normed, data=data).state.at == 6
