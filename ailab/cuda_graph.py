"""Whole-step replay: a compiled step is run a few times, recorded once, and then launched as one CUDA graph.

A graph reads and writes fixed memory. So the state has a home: the tensors that it had when it was recorded, into which the
step writes its new values anyway (donation). A batch is copied to fixed fields before each replay; logs and outputs are copied
out of fixed memory after it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ailab import tree

_WARM = 2  # calls that are run as they are, after the one that compiles
_PATIENCE = 20  # steps in which an earlier state is kept before it is said: a garbage collection may be due
_MOST = 4  # recordings of one step: a shape of batches each
_foreach_copy_: Callable[[list[Tensor], list[Tensor]], None] = getattr(torch, "_foreach_copy_")  # noqa: B009 - no public name
Call = Callable[
    [list[Tensor], Any], Any
]  # (leaves of the state, fields of the batch) -> (names, packed, outputs, leaves, ticks)


@dataclass(frozen=True)
class Recording:
    """A call that was recorded, and not run."""

    replay: Callable[[], Any]  # its result, in memory that the next replay writes to
    close: Callable[[], None]  # after it nothing is replayed


class Recorder(Protocol):
    """What records a call: CUDA, or a stand-in on a CPU."""

    def record(self, call: Callable[[], Any]) -> Recording:
        """Record a call without running it."""
        ...

    def host_draws(self) -> Tensor | None:
        """The state of the generator whose numbers a recording would freeze; None where there is none."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: they are replayed one after the other, on one stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> Recording:
        """Record what `call` launches. The generator is put back, so that the first replay draws what the call would have."""
        generator = torch.cuda.default_generators[self.device.index or 0]
        before, graph, enabled = generator.get_state(), torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # a tensor of another graph that is collected now would free memory in the middle of the recording
        try:
            # thread_local: the watchdog of NCCL asks for its events from a thread of its own.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = call()
        finally:
            if enabled:
                gc.enable()
        generator.set_state(before)

        def replay() -> Any:
            graph.replay()
            return result

        return Recording(replay, graph.reset)

    def host_draws(self) -> Tensor | None:
        """The state of the CPU's generator."""
        return torch.default_generator.get_state()


class HostRecorder:
    """The stand-in for a machine without CUDA: a replay calls, over the same fixed memory, and overwrites the last result."""

    def record(self, call: Callable[[], Any]) -> Recording:
        """Keep the call for its replays."""
        held: list[Any] = []

        def replay() -> Any:
            result = call()
            if not held:
                held.append(tree.map(lambda t: t.clone(), result))
            for (_, old), (_, new) in zip(tree.items(held[0]), tree.items(result), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            return held[0]

        return Recording(replay, held.clear)

    def host_draws(self) -> Tensor | None:
        """None: a replay draws anew."""
        return None


class Replay:
    """The recordings of all steps of a run. It is closed before the process group ends."""

    def __init__(self, recorder: Recorder, say: Callable[[str], None]):
        self.recorder, self.say = recorder, say
        self.captured: list[Captured] = []
        self.closed = False

    def of(self, run: Call, name: str) -> Captured:
        """`run`, the compiled step called `name`, which is replayed from its third call on."""
        self.captured.append(Captured(run, self, name))
        return self.captured[-1]

    def close(self) -> None:
        """Free all recordings. The steps then run as they are."""
        self.closed = True
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for captured in self.captured:
            captured.close()
        self.captured.clear()

    def is_alone(self, homes: list[Tensor], i: int) -> bool:
        """Whether nothing but recordings knows the tensor `homes[i]` or its memory, so that it may be written to."""
        lists = {id(c.homes): c.homes for c in self.captured if c.homes is not None}
        held = sum(1 for some in lists.values() for t in some if t is homes[i])
        return sys.getrefcount(homes[i]) == held + 1 and _uses_of_memory(homes[i]) == 1  # one more: the argument


class Captured:
    """A compiled step over flat leaves and fields. It is called as the step is; `adopt` says over which leaves."""

    def __init__(self, run: Call, owner: Replay, name: str):
        self.run, self.owner, self.name = run, owner, name
        self.calls = 0
        self.homes: list[Tensor] | None = None  # of the state's leaves
        self._fields: Any = None  # fixed memory of a batch, in its structure
        self._flat: list[Tensor] = []  # its tensors
        self._recording: Recording | None = None
        self._kept = 0  # calls before which somebody kept a part of an earlier state
        self._why_not = ""

    def __call__(self, leaves: list[Tensor], fields: Any) -> Any:
        """One step: a replay where `leaves` are the homes."""
        if self._recording is None or leaves is not self.homes:
            return self.run(leaves, fields) if self.calls >= _WARM else self._warm(leaves, fields)
        _foreach_copy_(self._flat, tree.leaves(fields))
        names, packed, outputs, new, ticks = self._recording.replay()
        return names, packed.clone(), tree.map(lambda t: t.clone(), outputs) if outputs else {}, new, ticks

    def _warm(self, leaves: list[Tensor], fields: Any) -> Any:
        self.calls += 1
        before = self.owner.recorder.host_draws()
        result = self.run(leaves, fields)
        if before is not None and not torch.equal(before, torch.default_generator.get_state()):
            self._refuse("the step draws random numbers on the CPU")
        return result

    def adopt(self, leaves: list[Tensor], fields: Any) -> list[Tensor] | None:
        """The homes, which then have the values of `leaves`; None where the next call is to run over these leaves as it is."""
        if self._recording is None:
            return self._recorded(leaves, fields)
        homes = self.homes
        assert homes is not None
        moved = [i for i, leaf in enumerate(leaves) if homes[i].data_ptr() != leaf.data_ptr()]
        if not all(self.owner.is_alone(homes, i) for i in moved):  # somebody keeps an old value: a graph would write over it
            self._kept += 1
            if self._kept == _PATIENCE:
                self.owner.say(f"{self.name} step: no CUDA graph in {_PATIENCE} steps: parts of an earlier state are kept")
            return None
        if moved:
            with torch.no_grad():
                _foreach_copy_([homes[i] for i in moved], [leaves[i] for i in moved])
        return homes

    def close(self) -> None:
        """Free the recording."""
        if self._recording is not None:
            self._recording.close()
        self._recording = self.homes = self._fields = None
        self._flat = []

    def _recorded(self, leaves: list[Tensor], fields: Any) -> list[Tensor] | None:
        if self.calls < _WARM or self._why_not or self.owner.closed:
            return None
        if reason := self._reason(leaves, fields):
            self._refuse(reason)
            return None
        self._fields = tree.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device), fields)
        self._flat = tree.leaves(self._fields)
        _foreach_copy_(self._flat, tree.leaves(fields))
        try:
            with torch.no_grad():
                self._recording = self.owner.recorder.record(lambda: self.run(leaves, self._fields))
        except RuntimeError as e:  # of CUDA: what may not be recorded. Nothing has run, so the state is whole
            self._refuse(str(e).strip().partition("\n")[0])
            self._fields, self._flat = None, []
            return None
        self.homes = leaves
        return leaves

    def _reason(self, leaves: list[Tensor], fields: Any) -> str:
        """Why this step cannot be recorded; "" where it can."""
        if sum(c.name == self.name and c.homes is not None for c in self.owner.captured) >= _MOST:
            return f"batches come in more than {_MOST} shapes; pad them to one"
        devices = {t.device.type for t in leaves}
        if len(devices) > 1:
            return "a part of the state is on another device"
        if any(0 in t.stride() and t.numel() > 1 for t in tree.leaves(fields)):
            return "a field of the batch is expanded"
        return ""

    def _refuse(self, why: str) -> None:
        if not self._why_not:
            self.owner.say(f"{self.name} step: no CUDA graph: {why}")
        self._why_not = why


def _uses_of_memory(tensor: Tensor) -> int:
    """How many tensors share the memory of this one, itself included; a private name of torch."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # this object is one more
