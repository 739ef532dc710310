"""Acceptance on one GPU: the laws of a run, on CUDA. At most 10 minutes on an H100 or H200, with torch 2.11 and no network.

    python -m benchmarks.gpu [LAW ...] [--keep-going] [--out benchmarks/results/gpu.json]

Each law is a function below; its first line says what it holds. The first one that is broken ends the run with exit code 1, or
with `--keep-going` the others are tried too. `--out` gets what each law measured, with hardware, torch version, date and commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ailab import tree
from ailab.build import loss_of
from ailab.config import check
from ailab.core.grad import ddp_grad, local_grad
from ailab.core.loss import module_state
from ailab.datasets.stream.prefetch import on_device
from ailab.job.assemble import Job, assemble
from ailab.optim import build_optimizer, lrs, with_lrs
from ailab.optim.rows import ROWS
from ailab.types import TrainState

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
LAWS: dict[str, Callable[[], dict[str, Any]]] = {}
CLASSES = 10
# Each hook that works on the state, with arguments under which it does something in a few steps.
HOOKS: dict[str, list[dict[str, Any]]] = {
    "no hook": [],
    "AMPHook bf16": [dict(type="AMPHook", dtype="bf16")],
    "AMPHook fp16": [dict(type="AMPHook", dtype="fp16", growth_interval=2)],
    "AugmentHook": [dict(type="AugmentHook", ops=[])],
    "EMAHook": [dict(type="EMAHook", decay=0.9)],
    "GradAccumulateHook": [dict(type="GradAccumulateHook", n=2)],
    "GradClipHook": [dict(type="GradClipHook", max_norm=0.1)],
    "GradStatsHook": [dict(type="GradStatsHook")],
    "LabelSmoothingHook": [dict(type="LabelSmoothingHook", classes=CLASSES)],
    "LookaheadHook": [dict(type="LookaheadHook", k=2)],
    "LrSchedulerHook by step": [dict(type="LrSchedulerHook", by="step", scheduler=dict(type="OneCycleLR", max_lr=0.1))],
    "LrSchedulerHook plateau": [dict(type="LrSchedulerHook", scheduler=dict(type="ReduceLROnPlateau"), metric="val_loss")],
    "MetricHook": [dict(type="MetricHook", top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}))],
    "RematHook": [dict(type="RematHook", modules=["body"])],
    "SAMHook": [dict(type="SAMHook", rho=0.05)],
    "SWAHook": [dict(type="SWAHook", start=1, by="step")],
    "SkipNonFiniteHook": [dict(type="SkipNonFiniteHook")],
    "SpikeHook": [dict(type="SpikeHook", policy="skip")],
}


def law(fn: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    LAWS[fn.__name__] = fn
    return fn


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm over (B, 1, 8, 8) pictures. Returns (B, 10) logits."""

    def __init__(self, width: int = 16, dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, width, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.drop, self.head = nn.Sequential(*layers), nn.Dropout(dropout), nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.drop(self.body(input).mean((2, 3))))


class Perceptron(nn.Module):
    """Two layers over (B, 1, 8, 8) pictures. Returns (B, 10) logits."""

    def __init__(self, width: int = 64, dropout: float = 0.0):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(64, width), nn.Dropout(dropout), nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.drop(self.first(input.flatten(1)).relu()))


class Transformer(nn.Module):
    """Two blocks of attention over the rows of (B, 1, 8, 8) pictures. Returns (B, 10) logits."""

    def __init__(self, width: int = 64, dropout: float = 0.0):
        super().__init__()
        layer = lambda: nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, batch_first=True, norm_first=True)  # noqa: E731
        self.embed, self.body, self.head = nn.Linear(8, width), nn.Sequential(layer(), layer()), nn.Linear(width, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input.flatten(0, 1) if input.dim() == 4 else input)).mean(1))


def pictures(n: int = 192) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 1, 8, 8, generator=g), torch.randint(CLASSES, (n,), generator=g))


SHORT_LAST = dict(train=dict(type=pictures, n=200), train_dataloader=dict(batch_size=32))


def cfg_of(
    folder: Path,
    *hooks: dict[str, Any],
    model: type = ConvNet,
    epochs: int = 1,
    dropout: float = 0.0,
    optimizer: Any = None,
    **more: Any,
) -> dict[str, Any]:
    cfg: dict[str, Any] = dict(
        work_dir=str(folder),
        total_epochs=epochs,
        data=dict(
            train=dict(type=pictures),
            val=dict(type=pictures, n=64),
            train_dataloader=dict(batch_size=32),
            val_dataloader=dict(batch_size=32),
        ),
        model=dict(type=model, dropout=dropout),
        loss=dict(type="CrossEntropyLoss"),
        optimizer=optimizer or dict(type="SGD", lr=0.05, momentum=0.9),
        hooks=[*hooks],
        compile=False,
    )
    return {**cfg, **more}


def assembled(folder: Path, *hooks: dict[str, Any], device: torch.device = CUDA, say: Any = None, **more: Any) -> Job:
    cfg = cfg_of(folder, *hooks, **more)
    check.check(cfg)
    torch.manual_seed(0)
    return assemble(check.complete(cfg), device, say=say or (lambda line: None))


@contextmanager
def no_device_read() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_of(job: Job, n: int, *, quiet: bool = False) -> TrainState:
    """The state after `n` training steps over the first batches; from the second on without a read from the device."""
    state, step = job.state, job.steps["train"]
    batches = [b for _, b in zip(range(n), job.streams["train"].epoch(0), strict=False)]
    for i, batch in enumerate(batches):
        if quiet and i > 1:
            with no_device_read():
                state, _ = step(state, batch)
        else:
            state, _ = step(state, batch)
    return state


def difference(a: Any, b: Any) -> tuple[float, str]:
    """The largest relative difference of two trees of tensors, relative to the largest element of each, and where it is."""
    worst = (0.0, "")
    for (path, x), (_, y) in zip(tree.items(a), tree.items(b), strict=True):
        if isinstance(x, Tensor) and x.numel() and x.is_floating_point():
            x, y = x.detach().double().cpu(), y.detach().double().cpu()
            worst = max(worst, (float((x - y).abs().max() / y.abs().max().clamp(min=1e-6)), path))
    return worst


def on_cpu(state: TrainState) -> list[str]:
    return [path for path, leaf in tree.items(state) if isinstance(leaf, Tensor) and leaf.device.type != "cuda"]


@law
def optimizers() -> dict[str, Any]:
    """Each optimizer's eager and compiled update on CUDA is torch's own in float64 on the CPU; it reads nothing back.

    But for the eager Adagrad and Muon: torch's forms take the learning rate as a number.
    """
    found: dict[str, Any] = {}
    for name in ROWS:
        shapes = {"a": (64, 32), "b": (48, 64)} if name == "Muon" else {"a": (64, 32), "b": (48,), "c": ()}
        g = torch.Generator().manual_seed(0)
        first = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
        grads = [{n: torch.randn(s, generator=g) for n, s in shapes.items()} for _ in range(4)]
        wide = torch.float32 if name == "Muon" else torch.float64  # Muon's own matrix products are in bfloat16
        own = [nn.Parameter(p.to(wide)) for p in first.values()]
        theirs = getattr(torch.optim, name)(own, lr=0.01)
        for gradient in grads:
            for p, value in zip(own, gradient.values(), strict=True):
                p.grad = value.to(wide)
            theirs.step()
        wanted = dict(zip(first, own, strict=True))
        for how in ("eager", "compiled"):
            params = {n: p.to(CUDA) for n, p in first.items()}
            optimizer = build_optimizer(name, params, lr=0.01)
            state = with_lrs(optimizer.init(params), lrs(optimizer.init(params)))
            update = optimizer.update if how == "eager" else torch.compile(optimizer.update, fullgraph=True)
            with torch.no_grad():
                for i, gradient in enumerate(grads):
                    given = tree.to(gradient, CUDA)
                    if i > 1 and (how == "compiled" or name not in ("Adagrad", "Muon")):
                        with no_device_read():
                            params, state = update(given, state, params)
                    else:
                        params, state = update(given, state, params)
            error, path = difference(params, wanted)
            found[f"{name} {how}"] = error
            assert error < (2e-2 if name == "Muon" else 1e-4), f"{name} {how}: {path} differs by {error:.1e}"
    return found


@law
def hooks_eager() -> dict[str, Any]:
    """Four eager steps with each hook equal those on the CPU; all of the state is on the device; no step reads it back."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, full_precision():
        for name, entries in HOOKS.items():
            job = assembled(Path(folder), *entries)
            assert not on_cpu(job.state), f"{name}: on the CPU: {on_cpu(job.state)}"
            if name == "AMPHook fp16":
                ours = steps_of(job, 4, quiet=True)
                assert all(t.isfinite().all() for t in ours.params.values())
                continue
            ours = steps_of(job, 4, quiet=True)
            assert not on_cpu(ours), f"{name}: on the CPU after a step: {on_cpu(ours)}"
            plain = steps_of(assembled(Path(folder), *entries, device=CPU), 4)
            error, path = difference(ours.params, plain.params)
            found[name] = error
            assert error < (5e-2 if "AMP" in name else 1e-3), f"{name}: {path} differs by {error:.1e}"
    return found


@law
def hooks_compiled() -> dict[str, Any]:
    """Four compiled steps with all hooks at once, and with each model in fp32 and bf16, equal the eager ones; nothing is read."""
    found: dict[str, Any] = {}
    many = [HOOKS[n][0] for n in ("GradAccumulateHook", "GradClipHook", "MetricHook", "EMAHook", "SkipNonFiniteHook")]
    cases: dict[str, tuple[type, list[dict[str, Any]]]] = {
        "convolutions": (ConvNet, []),
        "convolutions, hooks": (ConvNet, many),
        "convolutions, bf16": (ConvNet, HOOKS["AMPHook bf16"]),
        "attention": (Transformer, []),
        "attention, bf16": (Transformer, HOOKS["AMPHook bf16"]),
        "fp16": (ConvNet, HOOKS["AMPHook fp16"]),
        "SAM, SWA, Spike, Lookahead": (ConvNet, [HOOKS[n][0] for n in ("SAMHook", "LookaheadHook", "SWAHook", "SpikeHook")]),
    }
    with tempfile.TemporaryDirectory() as folder, full_precision():
        for name, (model, entries) in cases.items():
            eager = steps_of(assembled(Path(folder), *entries, model=model), 4)
            job = assembled(Path(folder), *entries, model=model, compile=True)
            began = time.perf_counter()
            ours = steps_of(job, 4, quiet=True)
            took = time.perf_counter() - began
            error, path = difference(ours.params, eager.params)
            found[name] = [error, round(took, 1)]
            half = "16" in name
            assert error < (5e-2 if half else 1e-3), f"{name}: {path} differs by {error:.1e}"
    return found


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32, in which a product has 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@law
def graphs() -> dict[str, Any]:
    """One graph for the batches of three epochs, their short last one too, or two where it cannot be padded: none after that."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, wanted in ((Transformer, 1), (ConvNet, 2)):
            job = assembled(Path(folder), model=model, compile=True, data=SHORT_LAST)
            state = job.state
            for epoch in range(3):
                for batch in job.streams["train"].epoch(epoch):
                    state, _ = job.steps["train"](state, batch)
            found[model.__name__] = count = len(job.steps["train"].graphs)
            assert count == wanted, f"{model.__name__}: {count} graphs"
    return found


CFG = """
from torch.utils.data import TensorDataset
from benchmarks.gpu import ConvNet, pictures
cfg = dict(
    work_dir={work_dir!r}, total_epochs=3, compile={compiled},
    data=dict(train=dict(type=pictures), val=dict(type=pictures, n=64),
              train_dataloader=dict(batch_size=32), val_dataloader=dict(batch_size=32)),
    model=dict(type=ConvNet, dropout=0.1), loss=dict(type="CrossEntropyLoss"), optimizer=dict(type="AdamW", lr=0.01),
    hooks=dict(ema=dict(type="EMAHook", decay=0.9), checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook")),
)
"""


@law
def resume() -> dict[str, Any]:
    """A run that is stopped after an epoch and resumed in another process ends with the bytes of one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        ends: list[dict[str, Tensor]] = []
        for name, stops in (("whole", []), ("cut", [1])):
            work_dir, file = Path(folder, name), Path(folder, f"{name}.py")
            file.write_text(CFG.format(work_dir=str(work_dir), compiled=True))
            for override in [*[[f"total_epochs={n}"] for n in stops], []]:
                done = subprocess.run(
                    [sys.executable, "-m", "ailab.fit", str(file), *override], capture_output=True, text=True, check=False
                )
                assert done.returncode == 0, done.stderr[-2000:]
            newest = max((work_dir / "checkpoints").glob("step_*"))
            ends.append(torch.load(newest / "state.pt", weights_only=True, map_location="cpu"))
        worst, where = difference(*ends)
        same = all(torch.equal(x, y) for (_, x), (_, y) in zip(*map(tree.items, ends), strict=True) if isinstance(x, Tensor))
        assert same, f"{where} differs by {worst:.1e}"
    return {"bytes": "equal"}


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels whose sums have one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@law
def replay() -> dict[str, Any]:
    """A run that is replayed as CUDA graphs has the bits of one that is not, with training and validation in turns."""
    found: dict[str, Any] = {}
    many = [HOOKS[n][0] for n in ("GradClipHook", "LrSchedulerHook by step", "EMAHook", "SWAHook", "MetricHook")]
    cases: dict[str, tuple[type, list[dict[str, Any]]]] = {
        "convolutions, hooks": (ConvNet, [*many, dict(type="SkipNonFiniteHook", policy="skip")]),
        "perceptron, fp16": (Perceptron, [*HOOKS["AMPHook fp16"], *HOOKS["LrSchedulerHook plateau"]]),
    }
    with tempfile.TemporaryDirectory() as folder, deterministic():
        for name, (model, entries) in cases.items():
            ends: list[Any] = []
            for graph in (True, False):
                said: list[str] = []
                more: dict[str, Any] = dict(model=model, dropout=0.1, epochs=6, compile=dict(cudagraph=graph))
                job = assembled(Path(folder), *entries, say=said.append, **more)
                state = job.run(job.state)
                recorded = [c for c in job.plan.replay.captured if c.homes] if job.plan.replay else []
                assert bool(recorded) == graph, said
                found[name] = len(recorded) or found.get(name, 0)
                ends.append(tree.clone(state))
                job.close()
                found[f"{name}, said"] = [line for line in said if "no CUDA graph" in line]
            error, path = difference(*ends)
            pairs = list(zip(*map(tree.items, ends), strict=True))
            assert all(torch.equal(x, y) for (_, x), (_, y) in pairs if isinstance(x, Tensor)), f"{name}: {path} by {error:.1e}"
    return found


class DrawsOnCPU(Perceptron):
    """Its noise is drawn on the CPU, which a recording would freeze."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.rand(()).to(input.device, non_blocking=True)


@law
def refusal() -> dict[str, Any]:
    """A step that cannot be recorded says why in one line, and trains."""
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        job = assembled(Path(folder), model=DrawsOnCPU, epochs=2, compile=True, say=said.append)
        state = job.run(job.state)
        job.close()
    told = [line for line in said if "no CUDA graph" in line]
    assert state.at == 12, state.at
    assert told, said
    return {"told": told}


@law
def speed() -> dict[str, Any]:
    """Microseconds of a step on the small nets, medians of interleaved rounds: replayed, compiled, eager, and a bare eager loop."""
    found: dict[str, Any] = {}
    for model in (Perceptron, ConvNet):
        with tempfile.TemporaryDirectory() as folder:
            ways: dict[str, Callable[[], None]] = {"bare": bare_loop(model)}
            for name, how in (("eager", False), ("compiled", dict(cudagraph=False)), ("replayed", dict(cudagraph=True))):
                ways[name] = our_loop(assembled(Path(folder), model=model, compile=how, optimizer=dict(type="AdamW", lr=1e-3)))
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(15):
                for name, steps in ways.items():
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    steps()
                    launched = time.perf_counter() - began
                    torch.cuda.synchronize()
                    times[name].append((time.perf_counter() - began) / 20 * 1e6)
                    times.setdefault(f"{name}, host", []).append(launched / 20 * 1e6)
            found[model.__name__] = {name: round(statistics.median(t), 1) for name, t in times.items()}
    return found


def bare_loop(model: type) -> Callable[[], None]:
    torch.manual_seed(0)
    net, loss = model().to(CUDA), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    x, y = (t[:32].to(CUDA) for t in pictures().tensors)

    def steps() -> None:
        for _ in range(20):
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()

    steps()
    return steps


def our_loop(job: Job) -> Callable[[], None]:
    step, batch, state = job.steps["train"], next(iter(job.streams["train"].epoch(0))), job.state

    def steps() -> None:
        nonlocal state
        for _ in range(20):
            state, _ = step(state, batch)

    steps()
    return steps


@law
def nccl() -> dict[str, Any]:
    """DistributedDataParallel over NCCL in a group of one gives the local gradient; the group ends within 5 s."""
    import torch.distributed as td

    with tempfile.TemporaryDirectory() as folder, full_precision():
        store = td.FileStore(str(Path(folder, "store")), 1)
        td.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
        torch.manual_seed(0)
        model = ConvNet().to(CUDA)
        loss = loss_of(model, nn.CrossEntropyLoss())
        state = tree.to(module_state(model), CUDA)
        x, y = pictures(32).tensors
        batch = {"input": x.to(CUDA), "target": y.to(CUDA)}
        grads, _ = ddp_grad(loss, state, nominal=32.0)(state, batch)
        wanted, _ = local_grad(loss)(state, batch)
        error, path = difference(grads, wanted)
        torch.cuda.synchronize()
        began = time.monotonic()
        td.destroy_process_group()
        took = time.monotonic() - began
        assert error < 1e-5, f"{path} differs by {error:.1e}"
        assert took < 5, f"the group took {took:.1f} s to end"
    return {"difference": error, "end_s": round(took, 2)}


@law
def prefetch() -> dict[str, Any]:
    """Each of 2,000 steps sees its own batch, with random waits on both sides; the copies do not wait for the steps."""
    import random

    r, n = random.Random(0), 2000
    work = torch.randn(512, 512, device=CUDA)

    def source() -> Iterator[dict[str, Tensor]]:
        for i in range(n):
            time.sleep(r.random() * 4e-4)
            yield {"x": torch.full((1 << 16,), i % 251, dtype=torch.uint8).pin_memory()}

    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    for i, batch in enumerate(on_device(source(), CUDA)):
        for _ in range(r.randrange(6)):
            work = (work @ work).clamp(-1, 1)
        wrong += (batch["x"] != i % 251).sum()
        time.sleep(r.random() * 2e-4)
    assert int(wrong) == 0, f"{int(wrong)} bytes are of another batch"
    return {"steps": n}


@law
def memory() -> dict[str, Any]:
    """What is allocated and reserved after 10 and after 300 steps is the same."""
    with tempfile.TemporaryDirectory() as folder:
        job = assembled(Path(folder), model=Transformer, compile=True, epochs=100)
        state, held = job.state, []
        epoch = 0
        while len(held) < 300:
            for batch in job.streams["train"].epoch(epoch):
                state, _ = job.steps["train"](state, batch)
                held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
            epoch += 1
    assert max(h[1] for h in held[10:]) <= held[9][1], f"reserved {held[9][1]} then {max(h[1] for h in held[10:])}"
    return {"allocated_mib": held[-1][0] / 2**20, "reserved_mib": held[-1][1] / 2**20}


def about() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(CUDA),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "date": str(date.today()),
        "commit": commit or "unknown",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("laws", nargs="*", choices=[*LAWS, []], metavar="LAW", help=", ".join(LAWS))
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here")
        return 1
    result: dict[str, Any] = {**about(), "laws": {}}
    broken = 0
    for name in args.laws or LAWS:
        began = time.perf_counter()
        try:
            found: dict[str, Any] = {"holds": True, **LAWS[name]()}
        except Exception as e:  # whatever breaks is a broken law
            traceback.print_exc()
            found = {"holds": False, "error": f"{type(e).__name__}: {e}"[:600]}
            broken += 1
        found["seconds"] = round(time.perf_counter() - began, 1)
        result["laws"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        if broken and not args.keep_going:
            break
    print(f"{broken} of {len(result['laws'])} laws are broken" if broken else "all laws hold")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
