"""The speed of data loading, relative to a well-written torchvision pipeline on the same files, in interleaved repeats.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--pictures 512] [--repeats 7] [--out benchmarks/results/data.json]

Theirs: `ImageFolder`, transforms.v2 on uint8 tensors, and `DataLoader` with persistent workers. The result is a normalised float32
batch in the main process, which reads it once. Ours: `ClassificationImageDataset` with the same crop and flip, the stream with the
same number of workers, and normalisation of the batch in a compiled graph, as in a training step, which reads it once too. Both
use generated pictures of 500x375 pixels that look like photographs (JPEGs of 90 kB), in a process that keeps freed memory as a run
does. A second part measures how long a step waits for in-memory data (digits, Fashion-MNIST). Times are medians over whole epochs.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ailab.config import check
from ailab.config.load import load
from ailab.datasets import BatchNormalize, ClassificationImageDataset, Stream
from ailab.datasets.files.cache import Cache
from ailab.heap import keep_freed
from ailab.job.assemble import assemble
from ailab.stack import Middleware

ROOT = Path(__file__).parents[1]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pictures_of_tests() -> Any:
    """The module tests/pictures.py, which generates the files."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tests" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_files(folder: Path, count: int) -> float:
    """Write `count` JPEGs into 4 folders, and return their mean size in kB."""
    pictures = pictures_of_tests()
    sizes = []
    for i in range(count):
        path = folder / f"class{i % 4}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every 8th picture is new, the others are flips of it: faster to make, and as slow to decode.
        if i % 8 == 0:
            base = pictures.photo(i, (375, 500), 14)
        path.write_bytes(pictures.encoded(base[:, ::-1] if i % 2 else base, "JPEG", quality=92))
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1e3


def crops(kind: str) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomResizedCrop(224, antialias=True)] if kind == "resized crop" else [v2.RandomCrop(224)]


def theirs(folder: Path, kind: str, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    """The torchvision pipeline: a function that gives the batches of an epoch."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = [v2.Resize(256, antialias=True)] if kind == "resize, crop" else []
    steps = [v2.PILToTensor(), *resize, *crops(kind), v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    loader = DataLoader(
        ImageFolder(str(folder), transform=v2.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: (read_once(x) for x, _ in loader)


def ours_read(folder: Path, kind: str) -> Dataset[Any]:
    """ailab's dataset with one folder per class: uint8, cropped, flipped."""
    crop = dict(type="RandomResizedCrop" if kind == "resized crop" else "RandomCrop", size=224)
    transform = [crop, dict(type="RandomHorizontalFlip")]
    return ClassificationImageDataset(folder, transform=transform, resize=256 if kind == "resize, crop" else None)


@torch.compile(dynamic=False)
def read_once(x: Tensor) -> Tensor:
    """Read a batch once, as a training step does."""
    return x.mean((0, 2, 3))


@torch.compile(dynamic=False)
def normalize_and_read(x: Tensor, out: Tensor) -> Tensor:
    """Normalise a uint8 batch into `out`, and read it once."""
    out.copy_(BatchNormalize([255 * m for m in MEAN], [255 * s for s in STD])(x))
    return out.mean((0, 2, 3))


def ours(folder: Path, kind: str, batch: int, workers: int, cache: Cache | None = None) -> Callable[[], Iterable[Any]]:
    settings: dict[str, Any] = {"num_workers": workers, "persistent_workers": True} if workers else {}
    stream = Stream(
        ours_read(folder, kind), batch_size=batch, shuffle=True, seed=0, pad=False, drop_last=False, cache=cache, **settings
    )
    epoch, out = iter(range(10**6)), torch.zeros(batch, 3, 224, 224)

    def batches() -> Iterable[Any]:
        for loaded in stream.epoch(next(epoch)):
            yield normalize_and_read(loaded["input"], out[: len(loaded["input"])])

    return batches


def cpu_seconds() -> float:
    """CPU seconds of this process and its workers. They count where all cores are busy, also with other programs."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed(batches: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """The wall seconds and the CPU seconds of an epoch."""
    start, cpu = time.perf_counter(), cpu_seconds()
    for means in batches():
        assert means.dtype == torch.float32
    return time.perf_counter() - start, cpu_seconds() - cpu


def compare(name: str, pipelines: dict[str, Callable[[], Iterable[Any]]], count: int, repeats: int) -> dict[str, Any]:
    """The pictures per second of each pipeline. Each repeat runs all of them; the first is the reference of the ratios."""
    for pipeline in pipelines.values():
        timed(pipeline)  # workers start, caches fill
    took: dict[str, list[tuple[float, float]]] = {n: [] for n in pipelines}
    for _ in range(repeats):
        for n, pipeline in pipelines.items():
            took[n].append(timed(pipeline))
    first = next(iter(took))
    row: dict[str, Any] = {"case": name, "pictures": count, "repeats": repeats}
    for n, pairs in took.items():
        seconds, cpu = zip(*pairs)
        wall_ratios, cpu_ratios = (sorted(a[i] / b[i] for a, b in zip(took[first], pairs)) for i in (0, 1))
        row[n] = {
            "pictures_per_s": round(count / statistics.median(seconds)),
            "ratio": round(statistics.median(wall_ratios), 2),
            "ratio_quartiles": [round(wall_ratios[len(pairs) // 4], 2), round(wall_ratios[-1 - len(pairs) // 4], 2)],
            "cpu_ms_per_picture": round(1e3 * statistics.median(cpu) / count, 2),
            "cpu_ratio": round(statistics.median(cpu_ratios), 2),
        }
        print(f"{name:<14}{n:<22}{row[n]['pictures_per_s']:>7} pictures/s   ratio {row[n]['ratio']:.2f} "
              f"{row[n]['ratio_quartiles']}   {row[n]['cpu_ms_per_picture']:.2f} ms of CPU, ratio {row[n]['cpu_ratio']:.2f}",
              flush=True)  # fmt: skip
    return row


def fashion_mnist(folder: Path) -> str:
    """The folder of Fashion-MNIST. If it is not installed, random files of the same sizes are written to `folder`."""
    from ailab.datasets.ready.fashion_mnist import DEBIAN, ENVIRONMENT

    found = os.environ.get(ENVIRONMENT) or (str(DEBIAN) if DEBIAN.is_dir() else "")
    if found:
        return found
    pixels = torch.randint(256, (60_000, 28, 28), dtype=torch.uint8)
    for name, shape, content in (("images-idx3", (60_000, 28, 28), pixels), ("labels-idx1", (60_000,), pixels[:, 0, 0] % 10)):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb", compresslevel=0) as file:
            file.write(head + content.numpy().tobytes())
    return str(folder)


def data_wait(cfg_file: str, epochs: int, *more: str) -> dict[str, Any]:
    """The share of a run's time in which it waits for the next batch."""
    waited: list[float] = []
    whole: list[float] = []

    def wrap(epoch: Any) -> Any:
        def run(state: Any, batches: Iterable[Any]) -> Any:
            spent = 0.0

            def watched() -> Iterable[Any]:
                nonlocal spent
                source = iter(batches)
                while True:
                    start = time.perf_counter()
                    batch = next(source, None)
                    spent += time.perf_counter() - start
                    if batch is None:
                        return
                    yield batch

            start = time.perf_counter()
            result = epoch(state, watched())
            whole.append(time.perf_counter() - start)
            waited.append(spent)
            return result

        return run

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"work_dir={folder}",
            f"total_epochs={epochs}",
            "compile=False",
            "workflow=[{'phase':'train','iters':40}]",
            *more,
        ]
        cfg = load(str(ROOT / "cfgs" / cfg_file), overrides)
        cfg = {**cfg, "hooks": {n: cfg["hooks"][n] for n in ("augment",)}}
        check.check(cfg)
        extra = [Middleware("waiting", wrap, "epoch", phases=("train",))]
        job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda _: None, extra=lambda run: extra)
        job.run(job.state)
    share = statistics.median(w / t for w, t in zip(waited[1:], whole[1:]))
    print(f"{cfg_file:<20} data wait {100 * share:.2f} % of the step", flush=True)
    return {
        "cfg": cfg_file,
        "wait_percent": round(100 * share, 3),
        "step_ms": round(1e3 * statistics.median(whole[1:]) / 40, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("resized crop", "resize, crop", "waits"), help="run this part alone")
    parser.add_argument("--out", default="benchmarks/results/data.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed(1 << 30)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        size = make_files(folder, args.pictures)
        for kind in ("resized crop", "resize, crop"):
            if args.only not in (None, kind):
                continue
            pipelines = {
                "torchvision": theirs(folder, kind, args.batch, args.workers),
                "ours": ours(folder, kind, args.batch, args.workers),
            }
            for place, where in (("ram", Path("/dev/shm") / f"ailab-benchmark-{os.getpid()}"), ("disk", Path(name) / "cache")):
                pipelines[f"ours, {place} cache"] = ours(
                    folder, kind, args.batch, args.workers, Cache(where, verify=place == "disk")
                )
            pipelines["ours, ram, no worker"] = ours(
                folder, kind, args.batch, 0, Cache(Path("/dev/shm") / f"ailab-benchmark-{os.getpid()}")
            )
            try:
                rows.append(compare(kind, pipelines, args.pictures, args.repeats))
            finally:
                Cache(Path("/dev/shm") / f"ailab-benchmark-{os.getpid()}").clear()
                Cache(Path(name) / "cache").clear()
    waits = [data_wait("exp.py", 6)]
    with tempfile.TemporaryDirectory() as name:
        waits.append(data_wait("fashion_mnist.py", 3, f"data.train.root={fashion_mnist(Path(name))}"))
    report = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "processor": platform.machine(),
            "load": os.getloadavg(),
        },
        "jpeg_kB": round(size, 1),
        "batch": args.batch,
        "workers": args.workers,
        "rows": rows,
        "waits": waits,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
