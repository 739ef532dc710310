"""Who started this process: torchrun's variables, or SLURM's turned into them."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit

from ailab.errors import ConfigError

_FIRST_PORT, _PORTS = 12000, 20000  # of a job's store: below the range that systems hand out by themselves


def set_torchrun_variables(environ: MutableMapping[str, str]) -> None:
    """Complete `environ` with torchrun's variables where a job of SLURM runs without torchrun."""
    environ.update(from_slurm(environ))


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that `srun` started.

    Empty where torchrun's own are there, or there is no such task, or it is the only one. What is set already stays: a
    MASTER_PORT of one's own, say. With GPUs bound to tasks (`--gpus-per-task`) a task sees its own as device 0.
    """
    world = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if "RANK" in environ or "WORLD_SIZE" in environ or "SLURM_PROCID" not in environ or int(world) < 2:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    bound = "SLURM_GPUS_PER_TASK" in environ or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    job, step = int(environ.get("SLURM_JOB_ID", "0")), environ.get("SLURM_STEP_ID", "0")
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": world,
        "LOCAL_RANK": "0" if bound else environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": "1" if bound else str(_tasks_here(environ)),
        "MASTER_ADDR": first_host(nodes) or "127.0.0.1",
        "MASTER_PORT": str(_FIRST_PORT + (job + 101 * (int(step) if step.isdigit() else 0)) % _PORTS),
    }
    return {name: value for name, value in found.items() if name not in environ}


def first_host(nodes: str) -> str:
    """The first of a list of hosts as SLURM writes it: "gpu[003-006,9],login" is gpu003 and others."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes.strip())
    assert found is not None  # it matches the empty string
    return "".join(part or "" for part in found.groups())


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node: "4(x2),3" is 4, 4 and 3 on three nodes; at least as many as this task's local number says."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    node, local = int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_LOCALID", "0"))
    return max(counts[node] if node < len(counts) else 1, local + 1)


def store_address(init_method: str, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Host and port of the store of a launch; None for a store of another kind, a file say.

    Raises:
        ConfigError: when a part of it is missing.
    """
    if init_method != "env://" and not init_method.startswith("tcp://"):
        return None
    try:
        if init_method == "env://":
            return environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        parts = urlsplit(init_method)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port
    except (KeyError, ValueError, AssertionError) as e:
        raise ConfigError(
            f"cfg.dist.init_method is {init_method!r}, from which no host and port can be read.\n"
            "  'env://' reads MASTER_ADDR and MASTER_PORT; else give 'tcp://host:port' of rank 0."
        ) from e


def port_problem(port: int) -> str:
    """A sentence, if a port of this machine cannot be opened."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as e:
            return f"port {port} cannot be opened here ({e.strerror}); another program may use it: choose another port."
    return ""
