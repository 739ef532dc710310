"""Which GPU a process takes, and the end of ranks that have met and do not agree. CUDA is a stub here."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from ailab import dist
from ailab.dist import group
from ailab.dist.rendezvous import Rendezvous
from ailab.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets how many GPUs this process sees, its local rank, and the processes on its machine."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def see(count: int, local: int, started: int) -> list[int]:
        chosen.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name, value in {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": started}.items():
            monkeypatch.setenv(name, str(value))
        return chosen

    return see


@pytest.mark.parametrize("local", range(4))
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one(gpus: Any, local: int) -> None:
    """Of four visible GPUs the one with its local number; of one visible GPU that one, whatever its local number."""
    chosen = gpus(4, local, 4)
    assert dist.pick_device() == torch.device("cuda", local)
    assert chosen == [local]
    chosen = gpus(1, local, 4)
    assert dist.pick_device() == torch.device("cuda", 0)
    assert chosen == [0]


def test_too_few_gpus_are_refused(gpus: Any) -> None:
    """Two visible GPUs for four processes are a ConfigError that says both ways out."""
    gpus(2, 0, 4)
    with pytest.raises(ConfigError, match=r"(?s)4 processes .* see 2 GPUs\. .* one process per GPU, or .*CUDA_VISIBLE_DEVICES"):
        dist.pick_device()


def meet(world: int, body: Any) -> list[Any]:
    """What `body(rendezvous)` returns or raises on each of `world` threads that share a store."""
    store, answers = HashStore(), [None] * world

    def rank(me: int) -> None:
        try:
            answers[me] = body(Rendezvous(store, me, world, 20))
        except Exception as error:
            answers[me] = error

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


@pytest.mark.parametrize(
    ("uuids", "visible", "shared"),
    [
        (["a", "b"], ["0", "0"], False),  # each task has a cgroup of its own
        (["a", "a"], ["MIG-1", "MIG-2"], False),  # two parts of one GPU
        (["a", "b"], ["3", "5"], False),
        (["a", "a"], ["", ""], True),  # torchrun with two processes on a machine with one GPU
        (["a", "a"], ["0", "0"], True),
    ],
)
def test_two_ranks_of_one_gpu_are_refused(
    uuids: list[str], visible: list[str], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that another rank has claimed is a ConfigError that names that rank; GPUs that only look alike are not."""
    turn = threading.Lock()

    def body(rendezvous: Rendezvous) -> ConfigError | None:
        me = rendezvous.rank
        with turn, monkeypatch.context() as patch:
            patch.setattr(group, "_rendezvous", rendezvous)
            patch.setenv("CUDA_VISIBLE_DEVICES", visible[me])
            patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[me]))
            return group.device_problem(torch.device("cuda", 0))

    problems = [p for p in meet(2, body) if p is not None]
    assert len(problems) == shared
    assert all(isinstance(p, ConfigError) and "the same GPU as rank" in str(p) for p in problems), problems
    assert group.device_problem(torch.device("cuda", 0)) is None  # with one process nothing is asked


class Slow(Rendezvous):
    """A rank that reads the common error late."""

    def _read(self, key: str, who: str) -> str:
        if key.endswith("/error") and self.rank == 1:
            time.sleep(0.6)
        return super()._read(key, who)


def test_rank_0_ends_after_all_have_read_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, which may hold the store, raises the common error only when a slow rank has read it too."""
    monkeypatch.setitem(meet.__globals__, "Rendezvous", Slow)
    ended: dict[int, float] = {}

    def body(rendezvous: Rendezvous) -> None:
        try:
            rendezvous.compare({}, ConfigError("a mistake") if rendezvous.rank == 2 else None)
        finally:
            ended[rendezvous.rank] = time.monotonic()

    answers = meet(3, body)
    assert [type(a) for a in answers] == [ConfigError] * 3
    assert {str(a) for a in answers} == {"on rank 2 of 3: a mistake"}
    assert ended[0] >= ended[1] - 0.05
    assert ended[1] - ended[2] > 0.3  # the others need not wait


def test_rank_0_does_not_wait_for_a_rank_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has ended before it read the error delays rank 0 by a bounded time."""
    monkeypatch.setattr("ailab.dist.rendezvous._LET_READ_S", 0.5)

    def body(rendezvous: Rendezvous) -> None:
        if rendezvous.rank == 1:  # it reports, and ends
            rendezvous.store.set(f"{rendezvous.attempt}/comparison1/1", '{"fingerprint": {}}')
            return
        rendezvous.compare({}, ConfigError("a mistake"))

    begun = time.monotonic()
    assert isinstance(meet(2, body)[0], ConfigError)
    assert 0.5 <= time.monotonic() - begun < 5
