"""How several processes start and end: SLURM, ranks that differ, a rank that never comes, a rank that fails."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Crew, config, free_port, torchrun_environ

from ailab import dist
from ailab.config import check
from ailab.dist import fingerprint, group, launcher
from ailab.dist.launcher import first_host, from_slurm
from ailab.dist.rendezvous import common_error
from ailab.errors import ConfigError, DataError
from ailab.stack import Middleware

# Variables of the launcher.

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[007-009,12]"}


def test_slurm_gives_torchruns_variables() -> None:
    """Rank, world size and local rank are SLURM's; the address is the first host; the port follows from the job, on all ranks."""
    job = {**SLURM, "SLURM_JOB_ID": "1234567", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "4,2(x2)"}
    assert from_slurm(job) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(12000 + 1234567 % 20000),
    }
    other = {**job, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert [from_slurm(other)[n] for n in ("LOCAL_WORLD_SIZE", "MASTER_PORT")] == ["4", from_slurm(job)["MASTER_PORT"]]


def test_slurm_is_read_only_where_torchrun_is_not() -> None:
    """torchrun's variables come first, one task is no launch, and a port that the user has set stays."""
    assert from_slurm({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}) == {}
    assert from_slurm({**SLURM, "SLURM_NTASKS": "1"}) == from_slurm({}) == {}
    assert "MASTER_PORT" not in from_slurm({**SLURM, "MASTER_PORT": "1"})
    assert from_slurm({**SLURM, "SLURM_GPUS_PER_TASK": "1"})["LOCAL_RANK"] == "0"  # it sees its own GPU only, as number 0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("gpu[003-006,9],login", "gpu003"),
        ("n[7]-ib", "n7-ib"),
        ("rack1n[12,14]", "rack1n12"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    """The first host of a list in SLURM's short form is found."""
    assert first_host(nodes) == first


def test_the_address_of_the_store() -> None:
    """Read from MASTER_ADDR and MASTER_PORT or from the url; a part that is missing is a ConfigError; a file has none."""
    environ = {"MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}
    assert launcher.store_address("env://", environ) == ("gpu1", 29500)
    assert launcher.store_address("tcp://10.0.0.1:23456", {}) == ("10.0.0.1", 23456)
    assert launcher.store_address("tcp://[::1]:23456", {}) == ("::1", 23456)
    assert launcher.store_address("file:///tmp/store", environ) is None
    for method in ("env://", "tcp://host", "tcp://:1", "tcp://host:port"):
        with pytest.raises(ConfigError, match=r"cfg\.dist\.init_method is .*, from which no host and port can be read"):
            launcher.store_address(method, {})


def test_a_port_that_is_taken_is_found() -> None:
    """A message if something listens at the port, and none afterwards."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        assert launcher.port_problem(port).startswith(f"port {port} cannot be opened here")
    assert launcher.port_problem(port) == ""


# What must be the same on every rank.


def test_the_rank_that_differs_is_named() -> None:
    """The value of most ranks is the usual one; each other value is printed with its ranks."""
    reports = [{"fingerprint": {"cfg.seed": s, "torch": "2.14"}} for s in ("1", "1", "7", "1", "8", "7")]
    kind, text = common_error(reports)
    assert kind == "PeerError"
    assert text.splitlines() == [
        "the ranks differ:",
        "  cfg.seed: 7 on ranks 2, 5, 1 on the others",
        "  cfg.seed: 8 on rank 4, 1 on the others",
    ]
    assert common_error([reports[0]] * 3) == ("", "")


def test_a_problem_of_some_ranks_is_raised_on_all() -> None:
    """The class of the first problem; its ranks if not all have it; its message unchanged if all have it."""
    problem: dict[str, Any] = {"kind": "DataError", "text": "no file"}
    assert common_error([{"fingerprint": {}}, problem]) == ("DataError", "on rank 1 of 2: no file")
    assert common_error([problem, problem]) == ("DataError", "no file")


def test_every_value_of_a_cfg_counts() -> None:
    """A change of any value, tensors and functions too, changes the fingerprint at its path and nowhere else."""
    base = config(hooks=dict(ema=dict(type="EMAHook", decay=0.9)), loss=dict(type="CrossEntropyLoss", weight=torch.ones(4)))
    plain = fingerprint.of_cfg(base)
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "cfg.seed": lambda c: c.update(seed=4),
        "cfg.hooks.ema.decay": lambda c: c["hooks"]["ema"].update(decay=0.8),
        "cfg.loss.weight": lambda c: c["loss"].update(weight=torch.tensor([1.0, 1, 1, 2])),
        "cfg.model.type": lambda c: c["model"].update(type=torch.nn.Linear),
        "cfg.work_dir": lambda c: c.update(work_dir="/" + 100 * "x"),
    }
    for path, change in changes.items():
        cfg = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
        cfg["hooks"] = {k: dict(v) for k, v in cfg["hooks"].items()}
        change(cfg)
        assert [n for n, v in fingerprint.of_cfg(cfg).items() if v != plain[n]] == [path]


def test_a_backend_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the backends that this torch has."""
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name == "nccl")
    with pytest.raises(ConfigError, match=r"cfg\.dist\.backend: this torch has no 'gloo'; it has: nccl\."):
        group._backend("gloo", torch.device("cpu"))


@pytest.mark.parametrize("shard", ["zero1", "fsdp"])
def test_sharding_says_what_stands_in_its_way(shard: str) -> None:
    """A ConfigError of at most four lines, before anything is built, that says why and what else saves memory."""
    with pytest.raises(ConfigError, match=rf"cfg\.dist\.shard is '{shard}', which is not served: .*") as error:
        check.check(config() | dict(dist=dict(shard=shard)))
    assert len(str(error.value).splitlines()) <= 4
    check.check(config() | dict(dist=dict(shard=None)))


# Whole launches.


def cfg_file(folder: Path) -> str:
    """A cfg file of a run of 12 steps. The environment can add samples, like a newer copy of the data on one node."""
    file = folder / "cfg_of_ranks.py"
    file.write_text(
        "import os\nfrom ranks import config\n"
        f"cfg = config() | dict(work_dir={str(folder / 'run')!r})\n"
        "from test_ranks_launch import Grown\ncfg['data']['train'] = dict(type=Grown, size=17)\n"
    )
    return str(file)


def Grown(size: int) -> Any:
    """Points, and as many more as the environment says."""
    from ranks import PointsInMemory

    return PointsInMemory(size + int(os.environ.get("MORE_POINTS", "0")))


def launched(folder: Path, world: int = 2, limit: float = 30, **per_rank: Any) -> tuple[list[int | None], list[str]]:
    """The exit codes, and what each rank printed. `argv` and `environ` have what is special to a rank: {rank: ...}."""
    argv, environ = per_rank.get("argv", {}), per_rank.get("environ", {})
    common = torchrun_environ(world, free_port())
    crew = Crew(
        folder,
        lambda rank: [cfg_file(folder), *argv.get(rank, [])],
        lambda rank: {**common(rank), **environ.get(rank, {})},
        world,
    )
    codes = crew.ended(limit)
    return codes, crew.printed()


def printed_once(printed: list[str], *parts: str) -> None:
    """Rank 0 printed one message, with these parts; the other ranks printed nothing."""
    assert printed[1:] == [""] * (len(printed) - 1)
    assert "Traceback" not in printed[0]
    for part in parts:
        assert printed[0].count(part) == 1, printed[0]
    assert len(printed[0].splitlines()) <= 4


def test_slurm_alone_starts_a_run(tmp_path: Path) -> None:
    """Two tasks with SLURM's variables only train together to the end."""
    port = free_port()

    def environ(rank: int) -> dict[str, str]:
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
        return {**own, "SLURM_JOB_NODELIST": "localhost", "MASTER_PORT": str(port)}

    crew = Crew(tmp_path, lambda rank: [cfg_file(tmp_path)], environ, 2)
    assert crew.ended(30) == [0, 0], crew.printed()
    assert "2 processes (ddp)" in crew.printed()[0]
    assert crew.printed()[1] == ""


def test_another_cfg_on_a_rank(tmp_path: Path) -> None:
    """Every rank ends with 7, and rank 0 prints which rank has which value of which key."""
    codes, printed = launched(tmp_path, argv={1: ["optimizer.lr=0.7"]})
    assert codes == [7, 7], printed
    printed_once(printed, "PeerError: the ranks differ:", "cfg.optimizer.lr: 0.7 on rank 1, 0.3 on the others")


def test_other_data_on_a_rank(tmp_path: Path) -> None:
    """Every rank ends with 7, and rank 0 prints which rank has how many samples."""
    codes, printed = launched(tmp_path, 3, environ={2: {"MORE_POINTS": "5"}})
    assert codes == [7, 7, 7], printed
    printed_once(printed, "cfg.data.train: 22 samples on rank 2, 17 samples on the others", "first samples: ")


def test_other_code_on_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component whose source file differs is a difference: the hash of the file is in the fingerprint."""
    source = "import torch\nclass Model(torch.nn.Linear):\n    pass\n"
    found = []
    for i, text in enumerate((source, source + "# changed\n")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "model_of_mine.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        import importlib
        import sys

        sys.modules.pop("model_of_mine", None)
        module = importlib.import_module("model_of_mine")
        found.append(fingerprint.of_parts({"cfg.model": module.Model(2, 2)}, {}, {}, {})["source of cfg.model"])
    assert found[0].startswith("Model (model_of_mine.py, ")
    assert found[0] != found[1]


def test_a_mistake_on_one_rank_ends_all(tmp_path: Path) -> None:
    """A cfg that is wrong on one rank alone ends every rank with 2, and rank 0 prints the error."""
    codes, printed = launched(tmp_path, argv={1: ["optimizer.lrr=1"]})
    assert codes == [2, 2], printed
    printed_once(printed, "ConfigError: on rank 1 of 2: cfg.optimizer.lrr: ")


def test_a_mistake_on_all_ranks_is_printed_once(tmp_path: Path) -> None:
    """A cfg that is wrong on all ranks is printed by rank 0, as with one process."""
    wrong = ["optimizer.lrr=1"]
    codes, printed = launched(tmp_path, argv={0: wrong, 1: wrong})
    assert codes == [2, 2], printed
    printed_once(printed, "ConfigError: cfg.optimizer.lrr: ")


def test_a_port_in_use(tmp_path: Path) -> None:
    """Rank 0 prints that the port is in use, and ends with 7 at once."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        method = f"dist.init_method=tcp://127.0.0.1:{port}"
        crew = Crew(tmp_path, lambda rank: [cfg_file(tmp_path), method], torchrun_environ(2, 1), 1)
        assert crew.ended(15) == [7], crew.printed()
    printed_once(crew.printed(), f"port {port} cannot be opened here", "Choose another port")


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """After dist.timeout_s seconds the other ranks print which rank is missing, and end with 7."""
    crew = Crew(tmp_path, lambda rank: [cfg_file(tmp_path), "dist.timeout_s=2"], torchrun_environ(2, free_port()), 1)
    assert crew.ended(15) == [7], crew.printed()
    printed_once(crew.printed(), "rank 0: rank 1 of 2 did not come within 2 s")


def waits_at(port: int, limit: float = 60) -> None:
    """Return once rank 0 has opened its store, where it waits for the others."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("rank 0 has opened no store")


def test_the_launcher_ends_ranks_that_wait(tmp_path: Path) -> None:
    """SIGTERM before the group is complete, which torchrun sends when another rank has died, ends the rank with 7 and a message."""
    port = free_port()
    crew = Crew(tmp_path, lambda rank: [cfg_file(tmp_path)], torchrun_environ(2, port), 1)
    waits_at(port)
    assert crew.processes[0].is_alive()
    os.kill(crew.processes[0].pid, signal.SIGTERM)
    assert crew.ended(5) == [7], crew.printed()
    printed_once(crew.printed(), "the launcher ended this run before all ranks had met")


def Ends(step: int, rank: int, how: str, name: str = "ends") -> Middleware[Any]:
    """A hook by which rank `rank` raises or is killed after a training step."""

    def wrap(train: Any) -> Any:
        def ending(state: Any, batch: Any) -> Any:
            state, logs = train(state, batch)
            if state.at == step and dist.rank() == rank:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise DataError("a sample of mine") if how == "data" else RuntimeError("a mistake of mine")
            return state, logs

        return ending

    return Middleware(name, wrap, "host")


def ending_cfg(folder: Path, rank: int, how: str) -> str:
    file = cfg_file(folder)
    hook = f"\nfrom test_ranks_launch import Ends\ncfg['hooks']['ends'] = dict(type=Ends, step=5, rank={rank}, how={how!r})\n"
    Path(file).write_text(Path(file).read_text() + hook)
    return file


@pytest.mark.parametrize(("how", "code"), [("raised", 1), ("data", 3), ("killed", -signal.SIGKILL)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_error_is_printed_once(tmp_path: Path, rank: int, how: str, code: int) -> None:
    """If one rank of three fails, the others end with 7 in 10 s. Its error is printed once; theirs once, and it names the rank."""
    file, store = (
        ending_cfg(tmp_path, rank, how),
        torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False),
    )
    environ = torchrun_environ(3, store.port)  # torchrun keeps the store: it outlives every rank
    crew = Crew(tmp_path, lambda _: [file], lambda r: {**environ(r), "TORCHELASTIC_USE_AGENT_STORE": "True"}, 3)
    begun = time.monotonic()
    assert crew.ended(25) == [code if r == rank else 7 for r in range(3)], crew.printed()
    assert time.monotonic() - begun < 20  # 10 s after the error, and the start of the run
    printed = crew.printed()
    everything = "\n".join(printed)
    assert everything.count("PeerError: step 6") == 1, everything
    assert everything.count("Traceback") == (how == "raised")
    if how != "killed":
        own = "\nRuntimeError: a mistake of mine" if how == "raised" else "DataError: a sample of mine"
        assert printed[rank].count(own) == everything.count(own) == 1
        assert everything.count(f"rank {rank} failed first; its message is here too.") == 1
