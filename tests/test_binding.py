"""Laws of binding: fields go to parameters by name, outputs get names, and nothing shifts, hides or vanishes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ailab.binding import bind, check_outputs, name_outputs, wrap_sample
from ailab.errors import ConfigError, DataError

FIELDS = {"input": 1, "target": 2, "output": 3, "aux": 4, "mask": 5}


def shapes(output, target, mask=None, *, weight=None):
    return output, target, mask, weight


def mutants(name: str) -> list[str]:
    """Names one edit away: a letter dropped, doubled, swapped with the next, replaced."""
    found = {name[:i] + name[i + 1 :] for i in range(len(name))} | {name[:i] + name[i] + name[i:] for i in range(len(name))}
    found |= {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    found |= {name[:i] + "z" + name[i + 1 :] for i in range(len(name))}
    return sorted(found - {name, ""})


def test_an_absent_optional_argument_shifts_nothing():
    """`f(a, b=None, c=None)` with the fields a and c gets c as c; the seed gave it as b."""

    def f(a, b=None, c=None):
        return a, b, c

    bound = bind(f, {}, "cfg.loss")
    assert bound.check({"a", "c"}) == []
    assert f(**bound.kwargs({"a": 1, "c": 3})) == (1, None, 3)


@settings(max_examples=100, deadline=None)
@given(st.permutations(list(FIELDS)), st.sets(st.sampled_from(["mask", "weight"])))
def test_the_order_of_fields_and_mapping_means_nothing(order, left_out):
    """Binding is a function of names: any order of the fields and any missing optional ones give the same arguments."""
    fields = {k: FIELDS[k] for k in order if k not in left_out}
    bound = bind(shapes, {"target": "input", "output": "aux"}, "cfg.loss")
    assert shapes(**bound.kwargs(fields)) == (4, 1, None if "mask" in left_out else 5, None)


def test_kwargs_receive_the_mapped_fields_and_nothing_else():
    """A function with **kwargs gets what is mapped, plus its named parameters; the seed gave it nothing."""

    def f(output, **losses):
        return output, losses

    bound = bind(f, {"ce": "aux", "l1": "mask"}, "cfg.loss")
    assert bound.check(FIELDS) == []
    assert f(**bound.kwargs(FIELDS)) == (3, {"ce": 4, "l1": 5})


@pytest.mark.parametrize("field", [m for f in ("output", "target", "mask") for m in mutants(f)])
def test_every_misspelt_field_is_reported(field):
    """A mapping to a field that does not exist names the path and the fields on offer."""
    (problem,) = bind(shapes, {"output": field}, "cfg.loss").check(FIELDS)
    assert problem.startswith(f"cfg.loss.mapping.output: there is no field '{field}'.")
    assert "Fields: input, target, output, aux, mask." in problem
    assert len(problem.splitlines()) <= 3


@pytest.mark.parametrize("parameter", mutants("target") + mutants("mask"))
def test_every_misspelt_parameter_is_reported_with_and_without_fields(parameter):
    """A mapping of a parameter that the function lacks is an error, before the fields are known too."""
    bound = bind(shapes, {parameter: "target"}, "cfg.loss")
    (problem,) = bound.check()
    assert problem.startswith(f"cfg.loss.mapping.{parameter}: shapes has no parameter '{parameter}'.\n  Did you mean")
    assert problem in bound.check(FIELDS)


def test_a_required_parameter_without_a_field_is_reported():
    """A parameter without default needs a mapping or a field of its name."""
    (problem,) = bind(shapes, {}, "cfg.loss").check({"output", "label"})
    assert problem.startswith("cfg.loss: shapes needs 'target', and no field has that name.")


def test_defaults_stand_in_for_the_own_name():
    """torch's `input` binds to the model's output and not to the batch field; `mapping` still wins."""
    loss, defaults = nn.CrossEntropyLoss(), {"input": ("output",)}
    assert bind(loss, {}, "cfg.loss", defaults=defaults).kwargs(FIELDS) == {"input": 3, "target": 2}
    assert bind(loss, {"input": "aux"}, "cfg.loss", defaults=defaults).kwargs(FIELDS) == {"input": 4, "target": 2}
    (problem,) = bind(loss, {}, "cfg.loss", defaults=defaults).check({"input", "target"})
    assert "needs 'input'" in problem


class Counter:
    def update(self, pred, label): ...

    def compute(self): ...


def test_what_is_bound_is_what_a_step_calls():
    """`forward` of a module object or class, `update` of a metric object or class, else the callable itself."""
    for fn, names in (
        (nn.Linear(1, 1), ("input",)),
        (nn.Linear, ("input",)),
        (Counter(), ("pred", "label")),
        (Counter, ("pred", "label")),
        (shapes, ("output", "target", "mask", "weight")),
    ):
        assert bind(fn, {}, "p").names == names


def test_kwargs_are_traced_without_a_graph_break():
    """A bound call compiles into one graph."""
    bound = bind(lambda output, target, mask=None: (output - target).sum(), {"target": "input"}, "p")
    compiled = torch.compile(lambda fields: bound.kwargs(fields), backend="eager", fullgraph=True)
    x, y = torch.ones(2), torch.zeros(2)
    assert compiled({"output": x, "input": y}).keys() == {"output", "target"}


def test_a_model_result_gets_its_names():
    """Tensor, tuple, list and dict become named fields."""
    a, b = torch.ones(1), torch.zeros(1)
    assert name_outputs(a, None, "p") == {"output": a}
    assert name_outputs(a, ["logits"], "p") == {"logits": a}
    assert name_outputs((a, [b]), ["x", "y"], "p") == {"x": a, "y": [b]}
    assert name_outputs({"out": a, "aux": b}, ("output",), "p") == {"out": a, "aux": b}
    assert name_outputs({"out": a, "aux": b}, ["aux"], "p") == {"aux": b}


@pytest.mark.parametrize(
    ("value", "keys", "said"),
    [
        ((1, 2, 3), ["a"], r"1 name \(a\), but the model returned 3 values"),
        ((1,), ["a", "b"], r"2 names \(a, b\), but the model returned 1 value\."),
        (torch.ones(1), ["a", "b"], "2 names"),
        ({"out": 1}, ["outt"], r"a dict without 'outt'\.\n  Did you mean 'out'"),
        (None, None, "returned NoneType"),
    ],
)
def test_names_and_values_that_differ_in_number_are_an_error(value, keys, said):
    """No part of a result is dropped and no name is left without a part; the seed cut the longer one."""
    with pytest.raises(ConfigError, match=said):
        name_outputs(value, keys, "cfg.model.output_keys")


def test_an_output_never_hides_a_batch_field():
    """An output with the name of a batch field is reported; the seed overwrote the field."""
    assert check_outputs(["output"], ["input", "target"], "p") == []
    (problem,) = check_outputs(["output", "target"], ["input", "target"], "cfg.model.output_keys")
    assert problem.startswith("cfg.model.output_keys: the output 'target' would hide the batch field 'target'.")


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        ((1, 2), ["input", "target"]),
        ([1], ["input"]),
        ((1, 2, 3, 4), ["input", "target", "field2", "field3"]),
        ({"x": 1}, ["x"]),
        (torch.ones(2), ["input"]),
        (np.ones(2), ["input"]),
    ],
)
def test_a_sample_becomes_named_fields(sample, names):
    """Tuples, lists, dicts, tensors and arrays are samples."""
    assert list(wrap_sample(sample)) == names


@pytest.mark.parametrize("sample", [None, 3, "path.png", (), []])
def test_anything_else_is_no_sample(sample):
    """What has no fields is a DataError that says what came."""
    with pytest.raises(DataError, match=type(sample).__name__):
        wrap_sample(sample)
