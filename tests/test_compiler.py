"""torch's compiler around a graph: where its cache is, and what is said when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ailab.compiler import refusal, tracing_errors, use_own_cache

CACHE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = f"inductor-{torch.backends.cpu.get_cpu_capability().lower()}"

STEP = """
import torch
from torch import nn
from ailab.compile import compile
from ailab.errors import ConfigError
from ailab.types import TrainState

def step(state, batch):
    return state.replace(step=state.step + 1, params={"w": (state.params["w"] * batch["x"]).sin()}), {}

state = TrainState(torch.zeros((), dtype=torch.int64), {"w": torch.ones(64)}, {}, {}, {})
try:
    state, _ = compile(step)(state, {"x": torch.ones(64)})
    print("ran", state.at)
except ConfigError as e:
    print(e)
"""


def ran(cache: Path, **env: str) -> str:
    env = {**os.environ, CACHE: str(cache), "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore", **env}
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, env=env, check=True)
    return done.stdout


def test_the_cache_is_in_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a choice of the user's the cache is in XDG_CACHE_HOME, which nobody else may enter; a choice of the user's stays."""
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use_own_cache()
    folder = tmp_path / "ailab" / FOLDER
    assert os.environ[CACHE] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(CACHE, "/somewhere")
    use_own_cache()
    assert os.environ[CACHE] == "/somewhere"


def test_torchs_own_choice_is_no_choice_of_the_users(tmp_path: Path) -> None:
    """torchvision imports the compiler, and torch then names a folder that anybody can guess: the cache is not there."""
    code = "import os, torchvision; from ailab.compiler import use_own_cache\n"
    code += f"before = os.environ[{CACHE!r}]; use_own_cache(); print(before != os.environ[{CACHE!r}], os.environ[{CACHE!r}])"
    env = {k: v for k, v in os.environ.items() if k != CACHE} | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", str(tmp_path / "ailab" / FOLDER)], done.stderr


def test_code_for_other_vector_instructions_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines of several kinds that see one home have a folder each: torch takes the code of another, which does not compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for capability in ("AVX2", "DEFAULT"):
        monkeypatch.delenv(CACHE, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        use_own_cache()
        assert os.environ[CACHE] == str(tmp_path / "ailab" / f"inductor-{capability.lower()}")


@pytest.mark.parametrize("how", ["a file in the way", "a link"])
def test_a_folder_that_is_not_ones_own_is_not_used(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder cannot be made, or leads elsewhere, the cache is a new folder of this process alone, mode 0700."""
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if how == "a link":
        (tmp_path / "ailab").mkdir()
        (tmp_path / "ailab" / FOLDER).symlink_to(tmp_path)
    else:
        (tmp_path / "ailab").touch()
    use_own_cache()
    folder = Path(os.environ[CACHE])
    assert not folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


@pytest.mark.nightly
def test_a_broken_cache_and_a_missing_compiler_are_told_from_tracing(tmp_path: Path) -> None:
    """A truncated file in the cache, and no compiler at all: the compiler's last lines, its folder, and compile=False."""
    assert ran(tmp_path / "a").strip() == "ran 1"
    for made in (tmp_path / "a").rglob("*.so"):
        os.truncate(made, 100)
    said = ran(tmp_path / "a")
    assert "the train step was traced, and torch's compiler failed on it." in said
    assert f"delete the cache: {tmp_path / 'a'}. compile=False needs no compiler." in said
    assert ".so" in said
    assert "cannot be traced" not in said
    said = ran(tmp_path / "b", CXX="/bin/false")
    assert "InvalidCxxCompiler, last lines:" in said
    assert "No working C++ compiler found" in said


def test_what_cannot_be_traced_says_what_was_raised() -> None:
    """An exception inside the traced code is named, and not only that there was one."""

    def failing(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("three is no even number")

    with pytest.raises(tracing_errors()) as caught:
        torch.compile(failing, fullgraph=True, backend="eager")(torch.ones(2))
    said = str(refusal(caught.value, "the train step"))
    assert "the train step cannot be traced as one graph" in said
    assert "three is no even number" in said
