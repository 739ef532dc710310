"""Laws of the reference: everything that a cfg can say has a text, and is told by name or by place."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ailab
from ailab import fit, help
from ailab.config.schema import SECTIONS
from ailab.errors import ConfigError
from ailab.registry import HOOKS, LR_SCHEDULERS, MODELS, REGISTRIES, Registry
from ailab.signature import texts

ROOT = Path(__file__).parents[1]
OWN = [(registry, name) for registry in REGISTRIES for name in registry.own()]
GIVEN = ("run", "name")  # by the framework


@pytest.mark.parametrize(("registry", "name"), OWN, ids=[f"{r.kind} {n}" for r, n in OWN])
def test_every_name_and_every_argument_of_it_has_a_text(registry: Registry, name: str) -> None:
    """The class or builder has a docstring of its own whose `Args:` explain what a cfg can give."""
    builder = registry.get(name)
    assert (builder.__doc__ or "").strip()
    said = texts(builder).arguments
    asked = [a.lstrip("*") for a in help.arguments(builder) if a not in (*registry.injected, *GIVEN)]
    assert [a for a in asked if not said.get(a)] == []


@pytest.mark.parametrize("place", SECTIONS)
def test_every_key_of_a_cfg_has_a_text_and_no_text_is_of_another_key(place: str) -> None:
    """The docstring of a section explains its keys, in their order."""
    said = texts(SECTIONS[place])
    assert said.head
    assert list(said.arguments) == list(help.arguments(SECTIONS[place]))
    assert all(said.arguments.values())


def test_the_list_has_every_name_with_its_line() -> None:
    """Grouped by kind; torch's own are there by name, and so is where torchvision's are looked up."""
    lines = [" ".join(line.split()) for line in help.page().splitlines()]
    assert [n for r, n in OWN if f"{n} {help.summary(r.get(n))}" not in lines] == []
    everything = " ".join(lines)
    assert all(n in everything for n in ("AdamW", "CrossEntropyLoss", "CosineAnnealingLR", "torchvision.models"))


def test_the_page_of_a_hook_says_all_there_is_to_know() -> None:
    """Its depth, its source, its arguments with types, defaults and texts, what each hook takes, and what it raises."""
    text = help.page("EMAHook")
    for part in (
        "EMAHook: hook, ailab/hooks/step/ema.py\n  Hooks at depth `step`",
        "\n  decay: float = 0.999\n      d, in [0, 1]. With 0 the average is the parameters themselves.\n",
        "takes: enable\n  More: python -m ailab.help cfg.hooks",
        "Raises:\n    ConfigError: when `decay` is outside [0, 1].",
    ):
        assert part in text
    assert "\n  name" not in text
    assert "\n  run" not in help.page("LoggerHook")


@pytest.mark.parametrize("hook", HOOKS.own())
def test_the_page_of_each_hook_tells_its_depth(hook: str) -> None:
    """The folder of a hook says at which depths it stands."""
    assert re.search(r"Hooks (at depth|that measure).*`(loss|grad|step|host|epoch|run)`", help.page(hook).splitlines()[1])


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("AdamW", ["optimizer, of torch.optim", "weight_decay: float = 0.01\n      weight decay coefficient"]),
        ("CrossEntropyLoss", ["label_smoothing: float = 0.0", "is called with: input, target"]),
        ("CosineAnnealingLR", ["T_max: int\n      Maximum number of iterations"]),
        ("torch.nn.Linear", ["in_features: int\n      size of each input sample"]),
        ("ailab.hooks.EMAHook", ["EMAHook: ailab/hooks/step/ema.py"]),
        ("MetricHook", ["\n  **metrics\n      for each name a dict with `type`"]),
        ("Top1Accuracy", ["is called with: "]),
        ("BatchShift", ["pixels: int\n      Largest shift in each direction, in pixels."]),
        ("cfg", ["seed: int >= 0 = 0\n", "compile: 'auto' | bool"]),
        ("cfg.data", ["truncated: 'skip' | 'fill' = 'skip'"]),
        ("cfg.data.train", ["type: AudioClassificationDataset, ", "a name of torchvision.datasets"]),
        ("cfg.data.train_dataloader", ["batch_size: int >= 1 = 1\n      of the global batch, over all ranks."]),
        ("cfg.data.val_dataloader.collate_fn", ["type: MultiScaleCollate, PadCollate"]),
        ("cfg.compile", ["cut: 'step' | 'grad' | 'loss' | None = None"]),
        ("cfg.compile.cut", ["cfg.compile.cut\n\n  cut: "]),
        ("cfg.workflow", ["phase: 'train' | 'val' | 'test'\n"]),
        ("cfg.workflow.0", ["iters: int >= 1 | None = None"]),
        ("cfg.workflow.1.ema", ["enable: bool = True"]),
        ("cfg.hooks", ["enable: bool = True", "EMAHook"]),
        ("cfg.hooks.ema.enable", ["enable: bool = True"]),
        ("cfg.model", ["output_keys: list[str] = ['output']", "`forward` is given the batch field", "ConvNet, MLP"]),
        ("cfg.loss", ["mapping: dict[str, str] = {}"]),
        ("cfg.optimizer", ["freeze: list[str] = []"]),
    ],
)
def test_names_and_places_have_a_page(topic: str, said: list[str]) -> None:
    """torch's names, dotted paths and every place of a cfg are told with types, defaults and texts."""
    text = help.page(topic)
    assert [part for part in said if part not in text] == []


def test_names_of_torchvision_have_a_page() -> None:
    """Where it is installed."""
    pytest.importorskip("torchvision")
    assert "weights: ResNet18_Weights | None = None\n      The pretrained weights to use." in help.page("resnet18")
    assert "p: float = 0.5\n      probability of the " in help.page("RandomHorizontalFlip")


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("EMAHok", "there is no 'EMAHok'. Did you mean 'EMAHook'?\n  More: python -m ailab.help\n"),
        ("AdmaW", "Did you mean 'AdamW'?"),
        ("cfg.dta", "cfg.dta: cfg takes no 'dta'.\n  Did you mean 'data'?"),
        (
            "cfg.compile.cutt",
            "cfg.compile.cutt: cfg.compile takes no 'cutt'.\n  Did you mean 'cut'? "
            "cfg.compile takes: cut, mode, donate, cudagraph.",
        ),
        ("cfg.model.width", "cfg.model.width is a matter of the `type` there"),
        ("torch.optim.Adamm", "torch.optim.Adamm: 'torch.optim' has no 'Adamm'.\n  Did you mean 'Adam'?"),
    ],
)
def test_what_is_unknown_ends_with_the_nearest_name(topic: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the error stream, with exit code 2."""
    assert help.main([topic]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert f"ConfigError: {said}" in out.err if said.startswith(topic) or "there is no" in said else said in out.err


def test_an_error_that_lists_what_is_on_offer_says_where_there_is_more() -> None:
    """The command of its last line has a page; of what only a cfg file knows there is none."""

    class Mine(torch.nn.Module):
        def __init__(self, width: int): ...

    with pytest.raises(ConfigError) as e:
        MODELS.get("ConvNett", "cfg.model.type")
    assert str(e.value).splitlines()[-1] == "  More: python -m ailab.help"
    assert len(str(e.value).splitlines()) <= 4
    problem = HOOKS.check({"type": "EMAHook", "deca": 1}, "cfg.hooks.ema")[0]
    assert problem.splitlines()[-1] == "  More: python -m ailab.help EMAHook"
    assert len(problem.splitlines()) == 3
    assert LR_SCHEDULERS.check({"type": "StepLR", "step_size": 1, "gama": 1}, "s")[0].endswith("ailab.help StepLR")
    assert "More" not in MODELS.check({"type": Mine, "widht": 1}, "cfg.model")[0]


def test_texts_takes_both_styles_of_docstring_apart() -> None:
    """ailab's and torch's `Args:`, with continued lines, colons in a text and sections after it; a class inherits."""

    class Base:
        """One.

        Args:
            a: first, as in
                `x: y`.
            b (int, optional): second. Default: 3
            **rest: third.

        Raises:
            ValueError: when.

        Source: somewhere.
        """

        def __init__(self, a: Any, b: int = 3, **rest: Any): ...

    class Derived(Base):
        """Two.

        Args:
            b: mine.
        """

    said = texts(Base)
    assert said.head == "One."
    assert said.arguments == {"a": "first, as in `x: y`.", "b": "second. Default: 3", "rest": "third."}
    assert said.rest == "Raises:\n    ValueError: when.\n\nSource: somewhere."
    assert texts(Derived).arguments == {"a": "first, as in `x: y`.", "b": "mine.", "rest": "third."}


def test_the_commands_are_listed_without_torch() -> None:
    """`python -m ailab` has a line for each module that can be run, and imports none of them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ailab"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    runnable = [
        f.stem for f in (ROOT / "ailab").glob("*.py") if f.stem != "__main__" and 'if __name__ == "__main__"' in f.read_text()
    ]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == sorted(runnable)
    assert {"fit", "data", "help"} <= set(runnable)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_the_command_line_of_a_run_says_that_all_this_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names the reference and the version, which pyproject reads from the package."""
    with pytest.raises(SystemExit):
        fit.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "python -m ailab.help" in out
    assert f"ailab {ailab.__version__}" in out
    assert 'attr = "ailab.__version__"' in (ROOT / "pyproject.toml").read_text()
