"""The keys of a cfg: type, default and meaning of each, written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ailab.binding import OUTPUT_KEYS
from ailab.signature import AtLeast

PHASES = ("train", "val", "test")
Count = Annotated[int, AtLeast(0)]
Positive = Annotated[int, AtLeast(1)]


@dataclass
class Dist:
    """`cfg.dist`."""

    backend: Literal["nccl", "gloo"] | None = None  # None: nccl on CUDA, gloo elsewhere
    init_method: str = "env://"
    sync: Literal["ddp", "graph"] = "ddp"
    shard: Literal["zero1", "fsdp"] | None = None  # not served: see _SHARDS
    timeout_s: Annotated[float, AtLeast(0)] = 600


@dataclass
class Compile:
    """`cfg.compile` as a dict; None leaves the choice to what is being compiled."""

    cut: Literal["step", "grad", "loss"] | None = None
    mode: str | None = None
    donate: bool | None = None


@dataclass
class Loader:
    """`cfg.data.<phase>_dataloader`; `batch_size` is that of the global batch, over all ranks."""

    batch_size: Positive = 1
    num_workers: Count = 0
    pin_memory: bool | None = None  # None: on CUDA
    persistent_workers: bool | None = None  # None: where there are workers
    prefetch_factor: Positive | None = None
    shuffle: bool | None = None  # None: in the train phase
    drop_last: bool = False
    sampler: dict[str, Any] | None = None  # in place of shuffle
    timeout: Annotated[float, AtLeast(0)] = 300  # seconds that a batch may take a worker; 0: no limit
    multiprocessing_context: Any = None
    collate_fn: Any = None  # a name, dict(type=...) or a callable


@dataclass
class Data:
    """`cfg.data`."""

    train: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    train_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    val_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    test_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    max_bad_frac: Annotated[float, AtLeast(0)] = 0.01  # of the samples of an epoch
    truncated: Literal["skip", "fill"] = "skip"  # pictures that end early
    nan_is_bad: bool = True  # a sample with a NaN in it
    cache: Literal["ram", "disk"] | None = None  # of decoded pictures


@dataclass
class Phase:
    """An entry of `cfg.workflow`, besides switches of hooks."""

    phase: Literal["train", "val", "test"]
    iters: Positive | None = None  # None: all batches


@dataclass
class Model:
    """The keys of `cfg.model` that the constructor does not get."""

    mapping: dict[str, str] = field(default_factory=dict[str, str])
    output_keys: list[str] = field(default_factory=lambda: list(OUTPUT_KEYS))


@dataclass
class Criterion:
    """The keys of `cfg.loss` that the constructor does not get."""

    mapping: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Optimizer:
    """The keys of `cfg.optimizer` that the constructor does not get."""

    param_groups: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    freeze: list[str] = field(default_factory=list[str])  # patterns of parameter names


@dataclass
class Switch:
    """The key of a hook's entry that its builder does not get, and all that a phase can say about a hook."""

    enable: bool = True


@dataclass
class Cfg:
    """The top level."""

    model: dict[str, Any]
    data: dict[str, Any]
    seed: Count = 0
    work_dir: str | Path = "./work_dir"
    dist: dict[str, Any] = field(default_factory=dict[str, Any])
    workflow: list[dict[str, Any]] | None = None  # None: train, then val, as far as `data` has them
    total_epochs: Positive = 1  # of a workflow that trains; one that only evaluates runs once
    loss: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    hooks: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict[str, Any])
    compile: Literal["auto"] | bool | dict[str, Any] = "auto"
    resume_from: str | Path | None = None
    resume_lr: Literal["keep", "initial"] | Annotated[float, AtLeast(0)] = "keep"
