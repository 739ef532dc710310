"""Laws of the registries: a name finds one builder, an argument is taken or refused, and nothing is dropped."""

import copy
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from ailab.errors import ConfigError, DataError
from ailab.registry import LOSSES, LR_SCHEDULERS, METRICS, MODELS, OPTIMIZERS, TRANSFORMS, Registry
from ailab.signature import fits, parameters


@pytest.fixture
def things() -> Registry:
    """A registry of its own, at home in a package that registers nothing."""
    return Registry("thing", "ailab.core", ("torch.nn",), lambda name, _: name.endswith("Loss"))


class Sized(nn.Module):
    def __init__(self, width: int, scale: float = 1.0, run: object = None):
        super().__init__()
        self.given = (width, scale, run)


def test_a_registered_name_finds_its_builder(things):
    """`register_module` offers a class or function under its own or a given name and returns it unchanged."""

    @things.register_module()
    def small(n: int = 1):
        return ("small", n)

    assert things.register_module(name="other")(Sized) is Sized
    assert things.names() == ["other", "small"]
    assert things.get("small") is small
    assert things.get("other") is Sized
    assert things.build({"type": "small", "n": 3}, "cfg.x") == ("small", 3)


def test_a_name_taken_twice_is_refused_with_the_place_of_the_first(things):
    """Two definitions cannot share a name unless the second says `force=True`."""
    things.register_module("Twin")(Sized)
    with pytest.raises(ConfigError, match=r"'Twin', defined at .*test_registry\.py:\d+") as e:
        things.register_module("Twin")(nn.Linear)
    assert "force=True" in str(e.value)
    things.register_module("Twin", force=True)(nn.Linear)
    assert things.get("Twin") is nn.Linear


def test_the_same_definition_executed_again_replaces_the_first(things, tmp_path):
    """A file that is executed twice, under another module name too, registers its classes again without an error."""
    file = tmp_path / "parts.py"
    file.write_text("@things.register_module()\nclass Part: pass\n")
    made = []
    for name in ("parts", "__main__", "parts"):
        space = {"things": things, "__name__": name}
        exec(compile(file.read_text(), str(file), "exec"), space)
        made.append(space["Part"])
    assert things.get("Part") is made[-1]


def test_the_decorator_without_parentheses_is_an_error(things):
    """`@X.register_module` over a class is refused instead of replacing the class by a decorator."""
    with pytest.raises(ConfigError, match="parentheses"):
        things.register_module(Sized)


@pytest.mark.parametrize(
    ("registry", "name", "expected"),
    [
        (OPTIMIZERS, "AdamW", torch.optim.AdamW),
        (LR_SCHEDULERS, "CosineAnnealingLR", torch.optim.lr_scheduler.CosineAnnealingLR),
        (LOSSES, "CrossEntropyLoss", nn.CrossEntropyLoss),
        (MODELS, "torch.nn.Linear", nn.Linear),
        (MODELS, "torch.nn:Linear", nn.Linear),
        (METRICS, "torch.nn:Linear.forward", nn.Linear.forward),
        (MODELS, Sized, Sized),
    ],
)
def test_names_of_torch_dotted_paths_and_objects_are_types(registry, name, expected):
    """A `type` is a name of torch, a dotted path or the object itself."""
    assert registry.get(name) is expected


@pytest.mark.parametrize("name", ["Optimizer", "Any", "Iterable", "lr_scheduler"])
def test_only_components_of_the_kind_are_offered(name):
    """What a torch module merely imports is no component."""
    with pytest.raises(ConfigError, match=f"no optimizer '{name}'"):
        OPTIMIZERS.get(name)


def test_names_of_torchvision_where_it_is_installed():
    """Models of torchvision go by their short names; without torchvision they are just not offered."""
    try:
        import torchvision
    except ImportError:
        with pytest.raises(ConfigError, match="no model 'resnet18'"):
            MODELS.get("resnet18")
    else:
        assert MODELS.get("resnet18") is torchvision.models.resnet18
        assert MODELS.get("fcn_resnet50") is torchvision.models.segmentation.fcn_resnet50
        with pytest.raises(ConfigError, match="Did you mean 'resnet18'"):
            MODELS.get("resnet18x")


@pytest.mark.parametrize(
    ("type_", "said"),
    [
        ("Adamm", "cfg.o.type: there is no optimizer 'Adamm'.\n  Did you mean 'Adam'"),
        ("torch.optin.Adam", "there is no module 'torch.optin'"),
        ("torch.optim.Adamm", "'torch.optim' has no 'Adamm'.\n  Did you mean 'Adam'"),
        ("torch.nn.functional.math", "'torch.nn.functional.math' is module, which cannot be called"),
        (".Adam", "is no path to an object"),
        ("Adam.", "is no path to an object"),
        (3, "expected a name, a class or a function, got int 3"),
    ],
)
def test_an_unknown_type_is_explained_in_four_lines(type_, said):
    """The error names the path, what came and the nearest name, in at most four lines."""
    with pytest.raises(ConfigError) as e:
        OPTIMIZERS.get(type_, "cfg.o.type")
    assert said in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_an_import_that_fails_says_why(tmp_path, monkeypatch):
    """A dotted path into a module that raises reports the cause, and not that the name is unknown."""
    (tmp_path / "broken_part.py").write_text("import no_such_dependency")
    (tmp_path / "raising_part.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing 'broken_part' failed: No module named 'no_such_dependency'") as e:
        MODELS.get("broken_part.Net", "cfg.model.type")
    assert isinstance(e.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ConfigError, match="RuntimeError: no driver"):
        MODELS.get("raising_part.Net")


def test_build_gives_every_argument_and_injects_only_what_the_signature_names():
    """Arguments arrive by name; `run` goes in because the constructor names it, `name` stays out; cfg is not changed."""
    cfg = {"type": Sized, "width": 3, "scale": 2}
    assert MODELS.build(cfg, "cfg.model", run="the run", name="m").given == (3, 2, "the run")
    assert cfg == {"type": Sized, "width": 3, "scale": 2}


def test_a_constructor_with_kwargs_gets_all_of_them():
    """A constructor with **kwargs receives every argument; the seed gave it none."""

    def resnet(**kwargs):
        return kwargs

    assert MODELS.build({"type": resnet, "num_classes": 10}, "cfg.model", run=1) == {"num_classes": 10}


def test_a_misspelt_argument_is_never_dropped():
    """An argument that the constructor does not take is an error; the seed dropped it."""
    with pytest.raises(ConfigError, match=r"cfg\.model\.widht: Sized takes no 'widht'\.\n  Did you mean 'width'\?") as e:
        MODELS.build({"type": Sized, "widht": 3}, "cfg.model", run=None)
    assert "cfg.model.width: Sized needs 'width'" in str(e.value)
    assert "takes: width, scale." in str(e.value)


def test_a_module_without_constructor_takes_nothing():
    """nn.Module's own (*args, **kwargs) does not pass for a constructor that accepts anything."""
    plain = type("Plain", (nn.Module,), {})
    assert MODELS.check({"type": plain, "lr": 1}, "cfg.model") == [
        "cfg.model.lr: Plain takes no 'lr'.\n  Plain takes no arguments."
    ]


def test_what_a_constructor_raises_comes_with_the_path_and_the_cause():
    """TypeError and ValueError of a constructor become a ConfigError that keeps the message; others pass."""

    def picky(n: int):
        raise (ValueError if n else KeyError)("n must be even")

    with pytest.raises(ConfigError, match=r"cfg\.model: picky could not be built: n must be even") as e:
        MODELS.build({"type": picky, "n": 1}, "cfg.model")
    assert isinstance(e.value.__cause__, ValueError)
    with pytest.raises(KeyError):
        MODELS.build({"type": picky, "n": 0}, "cfg.model")


def test_what_a_component_says_of_an_argument_has_the_whole_path(things):
    """Its own errors, and those of what is built inside it, begin with the path in the cfg; DataErrors stay DataErrors."""

    @things.register_module()
    class Picky:
        def __init__(self, keep: dict, files: int = 0):
            if files:
                raise DataError("no.csv: the split is empty.\n  It has no row.")
            raise ConfigError("Picky: keep.last: at least 2, got 1.\n  More.\nfiles.0: as bad\nthe end" if keep else "odd")

    def said(**given):
        with pytest.raises((ConfigError, DataError)) as e:
            things.build({"type": "Picky", **given}, "cfg.hooks.save")
        return type(e.value), str(e.value)

    whole = "cfg.hooks.save.keep.last: at least 2, got 1.\n  More.\ncfg.hooks.save.files.0: as bad\nthe end"
    assert said(keep={"last": 1}) == (ConfigError, whole)
    assert said(keep={}) == (ConfigError, "cfg.hooks.save: odd")
    assert said(keep={}, files=1) == (DataError, "cfg.hooks.save: no.csv: the split is empty.\n  It has no row.")


def test_names_of_dtypes_and_numbers_become_what_the_annotation_asks_for(things):
    """A text is a dtype where one is asked for, [1, 2] a float32 tensor where a Tensor is; nothing else is converted."""

    @things.register_module()
    def made(
        dtype: torch.dtype | dict[str, torch.dtype | None] | None = None,
        weight: torch.Tensor | None = None,
        text: str | torch.dtype = "",
        numbers: list[float] | torch.Tensor = (),
        free=None,
    ):
        return dtype, weight, text, numbers, free

    cfg = dict(type="made", dtype="torch.float16", weight=[1, 2.5], text="float32", numbers=[1], free=["float32", [1]])
    before = copy.deepcopy(cfg)
    dtype, weight, *rest = things.build(cfg, "cfg.x")
    assert cfg == before
    assert dtype is torch.float16 and torch.equal(weight, torch.tensor([1, 2.5])) and weight.dtype is torch.float32
    assert rest == ["float32", [1], ["float32", [1]]]
    assert things.build(dict(type="made", dtype={"image": "uint8", "mask": None}), "x")[0] == {
        "image": torch.uint8,
        "mask": None,
    }
    assert things.build(dict(type="made", weight=[[1, 2], [3, 4]]), "x")[1].shape == (2, 2)
    given = torch.ones(2, dtype=torch.float64)
    assert things.build(dict(type="made", weight=given, dtype=torch.int8), "x")[:2] == (torch.int8, given)
    for wrong in ({"dtype": "torch.flaot32"}, {"dtype": {"image": "flaot32"}}):
        (said,) = things.check({"type": "made", **wrong}, "cfg.x")
        assert said.startswith("cfg.x.dtype: expected dtype | ") and said.endswith("Did you mean 'float32'?")
    for wrong in ([1, "2"], [[1], [2, 3]], "1", True):
        assert len(things.check({"type": "made", "weight": wrong}, "cfg.x")) == 1


def test_class_weights_and_dtypes_of_torch_can_be_written_in_a_cfg():
    """A weighted cross-entropy and torchvision's ToDtype as text are those that torch makes of tensors and dtypes."""
    loss = LOSSES.build({"type": "CrossEntropyLoss", "weight": [1, 2, 0.5]}, "cfg.loss")
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(loss(x, y), nn.CrossEntropyLoss(torch.tensor([1, 2, 0.5]))(x, y))
    v2 = pytest.importorskip("torchvision.transforms.v2")
    ours = TRANSFORMS.build({"type": "ToDtype", "dtype": "float32", "scale": True}, "cfg.x")
    image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    assert torch.equal(ours(image), v2.ToDtype(torch.float32, scale=True)(image)) and ours(image).dtype is torch.float32


def test_a_built_module_is_used_as_it_is():
    """A module object as `type` is returned itself, and takes no arguments."""
    model = nn.Linear(2, 2)
    assert MODELS.build({"type": model}, "cfg.model") is model
    assert MODELS.check({"type": model, "bias": True}, "cfg.model")[0].startswith(
        "cfg.model.bias: Linear, which is already built,"
    )


def test_a_function_with_its_own_check_is_asked():
    """A builder's `check(entry, path)` replaces the generic check; keys of the framework are still checked."""

    def metrics(**entries):
        return entries

    metrics.check = lambda entry, path: [f"{path}: {sorted(entry)}"]
    found = METRICS.check({"type": metrics, "a": 1, "enable": 3}, "cfg.m", keys={"enable": bool})
    assert found == ["cfg.m.enable: expected bool, got int 3.", "cfg.m: ['a']"]


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1, -2], [True, 1.0, "1", None]),
        ("float", [1, 0.5], [False, "0.5"]),
        ("bool", [True], [1, "yes"]),
        ("str | None", ["a", None], [1]),
        ("Literal['a', 1]", ["a", 1], ["b", True]),
        ("tuple[float, float]", [(0.9, 1), [0.9, 0.99]], [(0.9,), 0.9, ("a", "b")]),
        ("tuple[int, ...]", [(), [1, 2]], [("a",)]),
        ("list[str]", [[], ["a"], ("a",)], ["a", [1]]),
        ("dict[str, int]", [{}, {"a": 1}], [{"a": "b"}, [1]]),
        ("float | torch.Tensor", [0.1, torch.ones(())], ["0.1x", True]),
        ("Path", ["a"], [1]),
        ("nn.Module", [1, "a", None], []),
    ],
)
def test_simple_annotations_judge_values(annotation, good, bad):
    """An int is a float, a bool is no int, lists and tuples are one, and what is not simple accepts all."""
    from pathlib import Path
    from typing import Literal

    type_ = eval(annotation, {"torch": torch, "nn": nn, "Path": Path, "Literal": Literal})
    assert [v for v in good if not fits(v, type_)] == []
    assert [v for v in bad if fits(v, type_)] == []


def test_an_annotation_that_cannot_be_resolved_is_no_error():
    """Names that exist for type checkers alone switch the judgement of values off, not that of names."""
    module = ModuleType("m")
    exec("from __future__ import annotations\ndef f(a: Missing, b: int = None): ...", module.__dict__)
    assert list(parameters(module.f).types) == ["a", "b"]
    assert MODELS.check({"type": module.f, "a": 1, "b": 2}, "cfg.m") == []


def test_none_fits_where_it_is_the_default():
    """`x: int = None` accepts None."""

    def f(x: int = None): ...  # noqa: RUF013

    assert MODELS.check({"type": f, "x": None}, "cfg.m") == []


def test_the_registry_imports_nothing_heavy():
    """Importing and checking do not import torchvision, pandas, tensorboard or wandb."""
    code = (
        "import sys; from ailab.config.check import check; from ailab.registry import *; "
        "OPTIMIZERS.get('SGD'); LOSSES.get('MSELoss'); DATASETS.names(); MODELS.names(); "
        "print([m for m in ('torchvision', 'pandas', 'tensorboard', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
