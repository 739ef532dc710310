"""TrainState, Mean and Logs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ailab.errors import DonatedError
from ailab.types import Logs, Mean, RunInfo, TrainState, pack, seal

NUMBERS = st.floats(-1e3, 1e3, width=32)
WEIGHTS = st.floats(0, 8, width=16)


def make() -> TrainState:
    return TrainState(
        torch.tensor(7), {"w": torch.ones(2)}, {"b": torch.zeros(1)}, {"m": [torch.ones(1)]}, {"s": torch.ones(1)}
    )


@given(st.lists(st.tuples(NUMBERS, WEIGHTS), min_size=2, max_size=8), st.integers(1, 7))
def test_mean_adds(samples: list[tuple[float, float]], cut: int) -> None:
    """The mean of a batch is the sum of the means of its parts, wherever it is cut."""
    values, weight = (torch.tensor(column, dtype=torch.float64) for column in zip(*samples, strict=True))
    cut = min(cut, len(samples) - 1)
    whole = Mean.of(values, weight)
    parts = Mean.of(values[:cut], weight[:cut]) + Mean.of(values[cut:], weight[cut:])
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-12, atol=0)


def test_mean_without_weights_counts_each_once() -> None:
    """`Mean.of(values)` is the plain mean, counted as many times as there are values."""
    mean = Mean.of(torch.tensor([1.0, 2.0, 6.0]))
    assert (float(mean.total), float(mean.weight), float(mean.value)) == (9.0, 3.0, 3.0)


def test_mean_of_nothing_is_zero() -> None:
    """A mean in which nothing counted has the value 0, not NaN."""
    assert float(Mean.of(torch.tensor([5.0]), torch.tensor([0.0])).value) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_counts_halves_in_float32(dtype: torch.dtype) -> None:
    """Values in a half are summed and counted in float32: 301 is no bfloat16, and 301 * 300 no float16."""
    for weight in (None, torch.ones(301)):
        mean = Mean.of(torch.full((301,), 300.0, dtype=dtype), weight)
        assert (float(mean.total), float(mean.weight)) == (301 * 300.0, 301.0)
        assert mean.total.dtype == mean.weight.dtype == torch.float32


def logs(**values: float) -> Logs:
    return seal({n: Mean(torch.tensor(2 * v), torch.tensor(2.0)) for n, v in values.items()})


def test_pack_and_read_back() -> None:
    """Packing logs keeps order, totals and weights, as float64, detached."""
    total = torch.tensor(3.0, requires_grad=True)
    packed = pack({"a": Mean(total, torch.tensor(2.0)), "b": Mean(torch.tensor(1, dtype=torch.int64), torch.tensor(4.0))})
    assert packed.dtype == torch.float64
    assert not packed.requires_grad
    assert packed.tolist() == [[3.0, 2.0], [1.0, 4.0]]
    assert pack({}).shape == (0, 2)
    assert pack(Logs(("a",), packed[:1])).tolist() == [[3.0, 2.0]]


def test_pack_keeps_the_digits_of_each() -> None:
    """A total in a low precision takes no digits from its weight."""
    packed = pack({"a": Mean(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(301.0))})
    assert packed.tolist() == [[1.0, 301.0]]


def test_logs_are_a_mapping() -> None:
    """Logs have the names, the length and the means of the dict that they were packed from; an unknown name is a KeyError."""
    mine = logs(loss=3.0, top1=0.5)
    assert list(mine) == ["loss", "top1"]
    assert len(mine) == 2
    assert float(mine["top1"].value) == 0.5
    assert mine.values_as_floats() == {"loss": 3.0, "top1": 0.5}
    with pytest.raises(KeyError):
        mine["top5"]


def test_values_as_floats_of_nothing_counted() -> None:
    """A mean in which nothing counted is 0.0 as a float, too."""
    assert Logs(("a",), torch.zeros(1, 2, dtype=torch.float64)).values_as_floats() == {"a": 0.0}


def test_prefixed_and_join() -> None:
    """Prefixes rename and joins put side by side; the numbers stay bitwise as they are."""
    a, b = logs(loss=3.0), logs(loss=5.0, top1=0.5)
    joined = Logs.join([a.prefixed("train_"), b.prefixed("val_")])
    assert joined.values_as_floats() == {"train_loss": 3.0, "val_loss": 5.0, "val_top1": 0.5}
    assert torch.equal(joined.packed, torch.cat([a.packed, b.packed]))
    assert len(Logs.join([])) == 0


def test_seal_parts_means_and_outputs() -> None:
    """Sealing packs the means and hands the model's outputs on under their own names; sealed logs stay as they are."""
    out = torch.ones(3)
    sealed = seal({"loss": Mean(torch.tensor(1.0), torch.tensor(1.0)), "@output": out})
    assert sealed.names == ("loss",)
    assert sealed.outputs == {"output": out}
    assert seal(sealed) is sealed


def test_states_are_immutable_values() -> None:
    """A field cannot be set; `replace` and `with_slot` make another state and leave this one as it is."""
    state = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.step = torch.tensor(0)  # type: ignore[misc]
    other = state.replace(step=torch.tensor(8)).with_slot("t", torch.tensor(1))
    assert (int(other.step), list(other.slots)) == (8, ["s", "t"])
    assert (int(state.step), list(state.slots)) == (7, ["s"])
    assert other.params is state.params


def test_at_is_the_step() -> None:
    """`at` is the step as an int, of a fresh state, of a changed one, and of an heir without a device read."""
    state = make()
    assert state.at == 7
    assert state.replace(step=torch.tensor(9)).at == 9
    assert state.with_slot("t", torch.tensor(0)).at == 7
    heir = state.consume(8)
    assert heir.at == 8  # the tensor still says 7: it is the compiled step that writes it


def test_clone_outlives_a_consumed_state() -> None:
    """A clone shares no memory with the state, and can be read after the state was consumed."""
    state = make()
    kept = state.clone()
    state.params["w"].zero_()
    state.consume(8)
    assert torch.equal(kept.params["w"], torch.ones(2))
    assert kept.at == 7


@pytest.mark.parametrize("name", ["step", "params", "buffers", "opt_state", "slots", "at"])
def test_a_consumed_state_raises(name: str) -> None:
    """Reading any field of a consumed state names the step that consumed it and both ways to keep a copy."""
    state = make()
    heir = state.consume(8)
    with pytest.raises(DonatedError, match=r"step 8 had consumed[\s\S]*state\.clone\(\)[\s\S]*donate=False"):
        getattr(state, name)
    assert torch.equal(heir.params["w"], torch.ones(2))
    with pytest.raises(DonatedError):
        state.clone()
    with pytest.raises(DonatedError):
        state.replace(step=torch.tensor(0))


def test_an_unknown_field_is_an_attribute_error() -> None:
    """A name that no state has is an AttributeError, before and after the state was consumed."""
    state = make()
    for _ in range(2):
        with pytest.raises(AttributeError, match="no field 'parameters'"):
            state.parameters  # noqa: B018
        if state.__dict__.get("step") is not None:
            state.consume(8)


def test_steps_of_a_run(tmp_path: object) -> None:
    """The steps of a run are those of its training phase times the epochs; 0 without such a phase."""

    def info(phases: dict[str, int]) -> RunInfo:
        return RunInfo({}, tmp_path, torch.device("cpu"), 0, 0, 1, 3, phases)  # type: ignore[arg-type]

    assert (info({"train": 5, "val": 2}).steps_per_epoch, info({"train": 5, "val": 2}).total_steps) == (5, 15)
    assert (info({"val": 2}).steps_per_epoch, info({"val": 2}).total_steps) == (0, 0)
