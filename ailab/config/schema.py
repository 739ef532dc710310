"""The keys of a cfg, written once: types and defaults in the fields, meanings in the docstrings, which `ailab.help` shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ailab.binding import OUTPUT_KEYS
from ailab.signature import AtLeast, CheckedBy, mismatch

PHASES = ("train", "val", "test")
Count = Annotated[int, AtLeast(0)]
Positive = Annotated[int, AtLeast(1)]


@dataclass
class Dist:
    """How the processes of a run find and tell each other. How many there are, the launcher says.

    Args:
        backend: of torch.distributed. None: nccl on CUDA, gloo elsewhere.
        init_method: where the processes meet: "env://" (MASTER_ADDR and MASTER_PORT, which torchrun sets) or "tcp://host:port".
        sync: how gradients are summed: "ddp" by DistributedDataParallel; "graph" in the compiled step.
        shard: of the state over ranks; not served, and the error says what stands in the way.
        timeout_s: seconds that a rank waits for the others.
    """

    backend: Literal["nccl", "gloo"] | None = None
    init_method: str = "env://"
    sync: Literal["ddp", "graph"] = "ddp"
    shard: Literal["zero1", "fsdp"] | None = None
    timeout_s: Annotated[float, AtLeast(0)] = 600


@dataclass
class Compile:
    """`cfg.compile` as a dict: compile, and how. None leaves the choice to the run.

    Args:
        cut: what is one graph: the whole "step", the "grad" (the loss and its gradient), or the "loss". None: the step, where
            that can be.
        mode: of `torch.compile`, such as "max-autotune". None: its default.
        donate: let the new state take the memory of the old one. None: yes.
        cudagraph: on CUDA, record the whole compiled step and launch the recording. None: where one process trains.
    """

    cut: Literal["step", "grad", "loss"] | None = None
    mode: str | None = None
    donate: bool | None = None
    cudagraph: bool | None = None


@dataclass
class Loader:
    """How the samples of one phase become batches. Most keys are those of `torch.utils.data.DataLoader`.

    Args:
        batch_size: of the global batch, over all ranks.
        num_workers: processes of each rank that read samples; 0 reads in the process itself.
        pin_memory: batches come in pinned memory. None: on CUDA.
        persistent_workers: workers live on from epoch to epoch. None: where there are workers.
        prefetch_factor: batches that each worker reads ahead. None: torch's default.
        shuffle: another order in each epoch. None: in the train phase.
        drop_last: leave out a last batch that is not full.
        sampler: what comes when, in place of shuffle: `dict(type="ClassBalancedSampler")`.
        timeout: seconds that a worker may take for a batch; 0: no limit.
        multiprocessing_context: how workers start: "fork", "spawn" or "forkserver". None: torch's default.
        collate_fn: a name, `dict(type="PadCollate", ...)` or a callable: a list of samples to a batch. None: samples are stacked.
    """

    batch_size: Positive = 1
    num_workers: Count = 0
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    prefetch_factor: Positive | None = None
    shuffle: bool | None = None
    drop_last: bool = False
    sampler: dict[str, Any] | None = None
    timeout: Annotated[float, AtLeast(0)] = 300
    multiprocessing_context: Any = None
    collate_fn: Any = None


@dataclass
class Data:
    """The datasets of the phases, and what holds for the reading of all of them.

    Args:
        train: the dataset of the train phase: `dict(type=..., **arguments)`.
        val: that of the val phase.
        test: that of the test phase.
        train_dataloader: how its samples become batches.
        val_dataloader: the same for val.
        test_dataloader: the same for test.
        max_bad_frac: share of a dataset that may be bad samples before the run ends.
        truncated: pictures that end early: "skip" counts them as bad, "fill" keeps a JPEG that is there by half.
        nan_is_bad: a sample with a NaN in it counts as bad.
        cache: of decoded pictures: "ram" in shared memory, "disk" in files. None: they are decoded each time.
    """

    train: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    train_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    val_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    test_dataloader: dict[str, Any] = field(default_factory=dict[str, Any])
    max_bad_frac: Annotated[float, AtLeast(0)] = 0.01
    truncated: Literal["skip", "fill"] = "skip"
    nan_is_bad: bool = True
    cache: Literal["ram", "disk"] | None = None


@dataclass
class Phase:
    """An entry of the workflow. It may also switch a hook, by its name in `cfg.hooks`: `ema=dict(enable=False)`.

    Args:
        phase: what runs.
        iters: steps of an epoch of this phase; past the end of the data it begins again. None: all batches once.
    """

    phase: Literal["train", "val", "test"]
    iters: Positive | None = None


@dataclass
class Model:
    """The model, `dict(type=..., **arguments)`, a torch.nn.Module: the keys that its constructor does not get.

    Each parameter of `forward` is given the batch field that `mapping` names, else the field of its own name, else its default.
    A dataset that delivers tuples has the fields "input", "target", "field2" and so on.

    Args:
        mapping: `{parameter of forward: batch field}`.
        output_keys: names of what `forward` returns, for the loss and the metrics. A dict keeps its own names.
        init: the first weights, from a file or another run: `dict(from_="work_dir/other", skip=["head.*"])`. None: its own.
    """

    mapping: dict[str, str] = field(default_factory=dict[str, str])
    output_keys: list[str] = field(default_factory=lambda: list(OUTPUT_KEYS))
    init: dict[str, Any] | None = None


@dataclass
class Init:
    """The first weights of the model. They are copied before a ResumeHook looks; a run that goes on does not read them again.

    Names are those of `state_dict()`; the prefixes "module." and "_orig_mod." of wrappers are removed. A pattern has `*` for any
    text. What matched and what did not is printed once.

    Args:
        from_: a checkpoint, or a folder that has some (the newest is taken); a torch file of a state_dict, alone or in a dict; or a
            file of safetensors.
        part: one sub-module of the file, by its dotted name: "encoder" makes "encoder.0.bias" to "0.bias".
        rename: `{pattern: new name}`; the text of each `*` goes where the new name has its own. The first match counts.
        skip: patterns of names, after `rename`: these tensors of the model stay as they are.
        strict: what is missing, left over or of another shape is an error. False: it is only printed.
    """

    from_: str | Path
    part: str | None = None
    rename: dict[str, str] = field(default_factory=dict[str, str])
    skip: list[str] = field(default_factory=list[str])
    strict: bool = True


@dataclass
class Criterion:
    """The loss, `dict(type=..., **arguments)`, a module or a function: the key that its constructor does not get.

    Each parameter is given the batch field or model output that `mapping` names, else the one of its own name. torch's own losses
    call the model's output `input`: they are given "output" there.

    Args:
        mapping: `{parameter of the loss: batch field or model output}`.
    """

    mapping: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Optimizer:
    """The optimizer, `dict(type=..., lr=..., **arguments)`: the keys that its constructor does not get.

    Patterns are those of `fnmatch` over the names of `named_parameters()`: `*` matches dots too.

    Args:
        param_groups: settings of their own for some parameters: `[dict(params="*.bias", weight_decay=0.0)]`; the first entry
            that matches a parameter has it.
        freeze: patterns of parameters that are not trained.
    """

    param_groups: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    freeze: list[str] = field(default_factory=list[str])


def is_several(value: Any) -> bool:
    """Whether an entry for one component has several: a list of entries, or a dict of them by name."""
    entries: list[Any] = (
        list(value.values() if isinstance(value, dict) else value) if isinstance(value, (dict, list, tuple)) else []
    )
    return bool(entries) and all(isinstance(e, dict) and "type" in e for e in entries)


def _check_optimizer(value: Any, path: str) -> list[str]:
    if is_several(value):
        return [
            f"{path}: {len(value)} optimizers, and a cfg has one. Compose several optimizers in Python, a state and a step for\n"
            "  each: see 'In Python, and several optimizers' in the README. For rates that differ by parameter: param_groups."
        ]
    return mismatch(value, dict[str, Any] | None, path)


@dataclass
class Switch:
    """A hook, `dict(type=..., **arguments)`: the key that its builder does not get, and all that a phase can say about a hook.

    `cfg.hooks` is a dict by name, or a list whose entries may have a `name`. Each hook wraps everything listed before it.

    Args:
        enable: False leaves the hook out; its entry is checked all the same.
    """

    enable: bool = True


@dataclass
class Cfg:
    """What a cfg file defines, as `cfg = dict(...)`.

    Args:
        model: what is trained: `dict(type=..., **arguments)`.
        data: the datasets and how they are read.
        seed: of the model's first values, the order of the data and all randomness of the run.
        work_dir: the folder that a run writes to.
        dist: several processes.
        workflow: the phases of an epoch, in order. None: train, then val, as far as `data` has them.
        total_epochs: how often the workflow runs; one that does not train runs once.
        loss: what is minimised. None: the model's output "loss".
        optimizer: what updates the parameters; needed by a workflow that trains.
        hooks: what else happens, by name or in a list; each hook wraps everything listed before it.
        compile: "auto" compiles where that pays, True and False decide, a dict says how.
        resume_from: a checkpoint, or a folder of them, that a ResumeHook starts from. None: those of `work_dir`.
        resume_lr: what a ResumeHook does with the schedule: "keep" goes on with it, "initial" or a learning rate starts it again.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    seed: Count = 0
    work_dir: str | Path = "./work_dir"
    dist: dict[str, Any] = field(default_factory=dict[str, Any])
    workflow: list[dict[str, Any]] | None = None
    total_epochs: Positive = 1
    loss: dict[str, Any] | None = None
    optimizer: Annotated[dict[str, Any], CheckedBy(_check_optimizer)] | None = None
    hooks: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict[str, Any])
    compile: Literal["auto"] | bool | dict[str, Any] = "auto"
    resume_from: str | Path | None = None
    resume_lr: Literal["keep", "initial"] | Annotated[float, AtLeast(0)] = "keep"


# The keys at each place of a cfg, beside those of the component that `type` names there.
SECTIONS: dict[str, type] = {
    "cfg": Cfg,
    "cfg.model": Model,
    "cfg.model.init": Init,
    "cfg.loss": Criterion,
    "cfg.optimizer": Optimizer,
    "cfg.data": Data,
    **{f"cfg.data.{phase}_dataloader": Loader for phase in PHASES},
    "cfg.workflow": Phase,
    "cfg.hooks": Switch,
    "cfg.compile": Compile,
    "cfg.dist": Dist,
}
