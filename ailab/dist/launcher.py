"""The launcher's environment variables: those of torchrun, or those of SLURM translated into them.

torchrun gives its processes 30 s after a SIGTERM. A first compilation may take longer. With `TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120` in
the environment the state can still be saved then.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit

from ailab.errors import ConfigError

_FIRST_PORT, _PORTS = 12000, 20000  # of the store of a SLURM job; below the ports that a system gives out by itself


def set_torchrun_variables(environ: MutableMapping[str, str]) -> None:
    """Add torchrun's variables to `environ` if `srun` started this process; see `from_slurm`."""
    environ.update(from_slurm(environ))


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that `srun` started.

    The result is empty if torchrun's variables are there, or if SLURM started no task or only one. A variable that is already
    set (a MASTER_PORT, for example) is left out. With `--gpus-per-task` each task sees one GPU, as device 0.
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
    """The first host of a list in SLURM's short form: "gpu003" for "gpu[003-006,9],login"."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes.strip())
    assert found is not None  # it matches the empty string
    return "".join(part or "" for part in found.groups())


def _tasks_here(environ: Mapping[str, str]) -> int:
    """The number of tasks on this node, at least local number + 1. SLURM writes "4(x2),3" for 4, 4 and 3 on three nodes."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    node, local = int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_LOCALID", "0"))
    return max(counts[node] if node < len(counts) else 1, local + 1)


def store_address(init_method: str, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The host and port of the launcher's store; None for another kind of store, such as a file.

    Raises:
        ConfigError: the host or the port is missing.
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
            "  Set MASTER_ADDR and MASTER_PORT for 'env://', or give 'tcp://host:port' of rank 0."
        ) from e


def port_problem(port: int) -> str:
    """A sentence that says why a TCP port of this machine cannot be opened; "" if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as e:
            return f"port {port} cannot be opened here ({e.strerror}); another program may use it. Choose another port."
    return ""
