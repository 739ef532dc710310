"""Fixtures and settings that the test files share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("ailab", deadline=None, derandomize=True, database=None)
settings.load_profile("ailab")

# For the whole session, before any test starts the server: it imports once what its processes would each import for a second.
multiprocessing.set_forkserver_preload(["ailab.fit", "ailab.hooks", "ailab.datasets", "ailab.models", "torch.nn.parallel"])


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.compile` traces and functionalizes as always, and runs the graph without generating code: seconds less a graph."""
    compile = torch.compile

    def compiled(fn: Any, **options: Any) -> Any:
        return compile(fn, **{**options, "backend": "aot_eager", "mode": None})

    monkeypatch.setattr(torch, "compile", compiled)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Any]]:
    from ranks import Ranks

    folder, made = tmp_path_factory.mktemp("ranks"), {}

    def of(world: int) -> Any:
        if world not in made:
            made[world] = Ranks(world, folder)
        return made[world]

    yield of
    for one in made.values():
        one.stop()
