"""torch's compiler around a graph: its cache, its private switches, what it says when it fails, what its code depends on."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._C._dynamo.guards import GlobalStateGuard

from ailab.errors import ConfigError

_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # of torch; what a user has set there counts
_LAST_LINES, _WIDTH = 3, 160  # of the compiler's output


def use_own_cache() -> None:
    """Let the compiler keep its files in a folder of the user's own: it runs what it finds there.

    torch's own choice is a name in the folder for temporary files that anybody can guess, and make first. Ours is
    `$XDG_CACHE_HOME/ailab/inductor-avx2`, or `~/.cache/ailab/inductor-avx2`, mode 0700, by the vector instructions in use: torch
    would take code that was made for others. Where there is no such folder, a new one for this process alone.
    """
    # torch puts its own choice into the environment as soon as the compiler is imported, by torchvision say: no user's choice.
    chosen = os.environ.get(_CACHE)
    if not chosen or chosen.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        os.environ[_CACHE] = str(_users_folder() or _folder_of_process())


def _users_folder() -> Path | None:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "ailab", f"inductor-{torch.backends.cpu.get_cpu_capability().lower()}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        folder.chmod(0o700)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _folder_of_process() -> str:
    folder = tempfile.mkdtemp(prefix="ailab-inductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _dynamo(module: str = "") -> Any:
    """torch's tracer, a private package; imported by a run that compiles, for it takes as long as torch itself."""
    return importlib.import_module(f"torch._dynamo{module}")


def allow_traced_grad() -> Any:
    """A context in which Dynamo traces `torch.autograd.grad`; a private switch, off by default on every supported version."""
    return _dynamo(".config").patch(trace_autograd_ops=True)


def lifted_settings(split: bool) -> Any:
    """A context of Dynamo's private switches: it traces gradients, and cuts a graph at DDP's buckets or does not.

    There is one graph for each shape of a batch, however many there are: its limits would end a run at the 9th.
    """
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    return _dynamo(".config").patch({"trace_autograd_ops": True, "optimize_ddp": split, **limits})


def mode_options(mode: str | None) -> dict[str, Any]:
    """The options that a `mode` of `torch.compile` stands for, which does not take both; a private table.

    Without torch's own CUDA graphs: they refuse a step that writes to its inputs. `cuda_graph` records the whole step.
    """
    options = importlib.import_module("torch._inductor").list_mode_options(mode) if mode else {}
    return {name: value for name, value in options.items() if name != "triton.cudagraphs"}


def overlap_options() -> dict[str, Any]:
    """Options of the compiler that move reductions over ranks under what is computed meanwhile, as far as this torch has them."""
    wanted = {"reorder_for_compute_comm_overlap": True, "aten_distributed_optimizations.enable_simple_overlap": True}
    known: dict[str, Any] = importlib.import_module("torch._inductor.config").get_config_copy()
    return {name: value for name, value in wanted.items() if name in known}


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far; a private counter."""
    return int(_dynamo(".utils").counters["stats"]["unique_graphs"]) if "torch._dynamo" in sys.modules else 0


def tracing_errors() -> type[Exception]:
    """What `torch.compile` raises where it cannot trace or compile; a private class."""
    return _dynamo(".exc").TorchDynamoException


def refusal(error: Exception, what: str, *, holds_more: bool = True) -> ConfigError:
    """What to say of an error of `torch.compile`: whether it is the code that cannot be traced, or the compiler that failed.

    Args:
        error: of the class `tracing_errors()`.
        what: was compiled: "the train step".
        holds_more: whether more is in it than the loss, so that less can be compiled.
    """
    if not isinstance(error, _dynamo(".exc").BackendCompilerFailed):
        said, *more = [line.strip() for line in str(error).strip().splitlines()]
        raised = next((line.partition("raised exception ")[2] for line in more if "raised exception " in line), "")
        said = f"{said}: {raised[-_WIDTH:]}" if raised else said  # of a long one the end says why
        less = "; compile=dict(cut='loss') compiles the forward and backward only" if holds_more else ""
        return ConfigError(
            f"cfg.compile: {what} cannot be traced as one graph: {said}\n  compile=False runs it as it is{less}."
        )
    cause: Any = getattr(error, "inner_exception", None) or error
    lines = [line.strip()[:_WIDTH] for line in str(cause).splitlines() if line.strip()]
    return ConfigError(
        f"cfg.compile: {what} was traced, and torch's compiler failed on it. {type(cause).__name__}, last lines:\n"
        + "".join(f"    {line}\n" for line in lines[-_LAST_LINES:])
        + f"  If a file of its cache is broken, delete the cache: {os.environ.get(_CACHE)}. compile=False needs no compiler."
    )


class Settings:
    """Numbers the global settings of torch that a compiled graph has in its code, in the order in which they are seen.

    They are the settings that torch's own guards hold: autocast and its dtypes, precision and determinism flags, grad mode, the
    number of threads, the default dtype; and inference mode, the default device and cuDNN's flags. Costs 0.5 us.
    """

    def __init__(self) -> None:
        self._guards: list[Any] = []
        self._last = 0

    def __call__(self, device: torch.device) -> Any:
        """What to put in the key of a graph for `device`."""
        number = self._number()
        modes = torch._C._len_torch_function_stack() and torch.get_default_device()  # a default device is such a mode
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            return number, modes, torch.is_inference_mode_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic
        return number, modes, torch.is_inference_mode_enabled()

    def _number(self) -> int:
        guards = self._guards
        if guards and guards[self._last].check():
            return self._last
        for i, guard in enumerate(guards):
            if guard.check():
                self._last = i
                return i
        guards.append(_guard_of_settings())
        self._last = len(guards) - 1
        return self._last


def _guard_of_settings() -> Any:
    """An object whose `check()` says whether torch's global settings are those of now; private, one call for all of them."""
    return GlobalStateGuard()
