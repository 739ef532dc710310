"""The laws of a run over random cfgs: a few in each run of the tests, many with `-m nightly`. The id of a test has its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz import laws
from fuzz.draw import Draw, draw

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's and torchmetrics' own, about settings that were drawn


def seeds(few: int, many: int, chunk: int) -> Any:
    """A test over the first seeds in each run of the tests, and one for each chunk of the others in a nightly run."""
    starts = range(few, many, chunk)
    nightly = [
        pytest.param(range(s, min(s + chunk, many)), marks=pytest.mark.nightly, id=f"{s}-{s + chunk - 1}") for s in starts
    ]
    return pytest.mark.parametrize("seeds", [pytest.param(range(few), id=f"0-{few - 1}"), *nightly])


def rank_draw(seed: int) -> Draw:
    """Ranks draw numbers of their own, and add up gradients in the dtype of the model: no halves."""
    return draw(seed, drawing=False, halves=False)


def report(failures: list[str]) -> None:
    assert not failures, "\n\n" + "\n\n".join(failures)


@seeds(3, 53, 10)
def test_compiled_equals_eager(seeds: range, tmp_path: Path, aot_eager: None) -> None:
    """L1: a run that is compiled at any cut is the eager run, where nothing is drawn."""
    report(laws.over(laws.compiled_equals_eager, [draw(s, drawing=False) for s in seeds], tmp_path))


@seeds(1, 11, 10)
def test_compiled_draws_as_eager(seeds: range, tmp_path: Path, aot_eager: None) -> None:
    """L1: a compiled step draws the random numbers of the eager step, where the compiler generates no code of its own."""
    report(laws.over(laws.compiled_equals_eager, map(draw, seeds), tmp_path))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2))
def test_generated_code_equals_eager(seed: int, tmp_path: Path) -> None:
    """L1: a run whose whole step is generated code is the eager run."""
    law = lambda drawn, work_dir: laws.compiled_equals_eager(drawn, work_dir, "step")
    report(laws.over(law, [draw(seed, drawing=False)], tmp_path))


@seeds(8, 308, 50)
def test_resumed_equals_whole(seeds: range, tmp_path: Path) -> None:
    """L2: a run that was stopped anywhere, by a signal or an error, and resumed is the run that was not."""
    report(laws.over(laws.resumed_equals_whole, map(draw, seeds), tmp_path))


@seeds(4, 104, 25)
def test_workers_change_nothing(seeds: range, tmp_path: Path) -> None:
    """L3: a run is the same for any number of workers, and for data in memory."""
    report(laws.over(laws.workers_change_nothing, map(draw, seeds), tmp_path))


@pytest.mark.parametrize("sync", ["ddp", "graph"])
@seeds(4, 104, 25)
def test_ranks_equal_one_process(seeds: range, sync: str, ranks: Any, tmp_path: Path) -> None:
    """L4: two ranks are one process, with sums as losses too, and with the statistics of all ranks where there is BatchNorm."""
    report(laws.over(lambda drawn, _: laws.ranks_equal_one_process(ranks, drawn, sync), map(rank_draw, seeds), tmp_path))


@pytest.mark.nightly
@pytest.mark.parametrize("sync", ["ddp", "graph"])
@pytest.mark.parametrize("seeds", [range(3)], ids=lambda r: f"{r[0]}-{r[-1]}")
def test_compiled_ranks_equal_one_process(seeds: range, sync: str, ranks: Any, tmp_path: Path) -> None:
    """L4: two ranks are one process, compiled."""
    report(laws.over(lambda drawn, _: laws.ranks_equal_one_process(ranks, drawn, sync, True), map(rank_draw, seeds), tmp_path))


@seeds(15, 415, 50)
def test_equals_plain_torch(seeds: range, tmp_path: Path) -> None:
    """L5: a run is a textbook loop in plain torch: parameters, buffers, losses and validation losses."""
    report(laws.over(laws.equals_plain_torch, [draw(s, plain=True) for s in seeds], tmp_path))


@seeds(20, 1020, 100)
def test_runs_or_is_refused(seeds: range, tmp_path: Path) -> None:
    """L6: a cfg runs, or is refused before its first step with a sentence that begins with its path."""
    report(laws.over(laws.runs_or_is_refused, map(draw, seeds), tmp_path))
