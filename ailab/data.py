"""`python -m ailab.data cfgs/exp.py --split train`: statistics of a dataset, its bad samples, and a contact sheet."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab import tree
from ailab.binding import wrap_sample
from ailab.config import check
from ailab.config.load import load as load_cfg
from ailab.config.schema import PHASES
from ailab.datasets import Stream
from ailab.datasets.files.bad_file import BadSample
from ailab.datasets.stream.order import Plan
from ailab.errors import AilabError, ConfigError
from ailab.hooks.loss.augment import AugmentHook
from ailab.job.build import build_dataset, reading_of
from ailab.pictures.contact_sheet import FieldInfo, class_name, contact_sheet
from ailab.registry import TRANSFORMS
from ailab.rng import mix
from ailab.types import WEIGHT

_READ = 16  # samples per batch
_MAX_LINES = 20  # bad samples or classes that are listed
_LABELS = ("target", "label", "labels", "class", "y")


@dataclass
class FieldSummary:
    """Statistics of one field over all samples."""

    kinds: Counter[str] = field(default_factory=Counter[str])  # by dtype and shape
    count: int = 0  # numbers per channel
    total: Tensor | None = None  # sum per channel, (C,) or (1,)
    squares: Tensor | None = None  # sum of squares
    low: float = math.inf
    high: float = -math.inf
    classes: Counter[int] = field(default_factory=Counter[int])

    def add(self, name: str, value: Any) -> None:
        """Add the value of one sample."""
        if isinstance(value, bool | int | float):
            value = torch.tensor(value)
        if not isinstance(value, Tensor):
            self.kinds[type(value).__name__] += 1
            return
        self.kinds[f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"] += 1
        if name.rpartition(".")[2] in _LABELS and not value.is_floating_point() and value.dim() < 2:
            self.classes.update(value.flatten().tolist())
        if value.numel():
            rows = value.double().reshape(value.shape[0] if value.dim() == 3 else 1, -1)
            self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
            if self.total is None or len(self.total) == len(rows):
                self.total = rows.sum(1) if self.total is None else self.total + rows.sum(1)
                self.squares = (rows**2).sum(1) if self.squares is None else self.squares + (rows**2).sum(1)
                self.count += rows.shape[1]

    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation: one number per channel for images, otherwise one number."""
        if self.total is None or self.squares is None or not self.count:
            return [], []
        mean = self.total / self.count
        return mean.tolist(), (self.squares / self.count - mean**2).clamp(min=0).sqrt().tolist()


@dataclass(frozen=True)
class SplitSummary:
    """The statistics of a split."""

    size: int  # samples of the dataset
    read: int  # samples that were read
    fields: Mapping[str, FieldSummary]
    bad: Sequence[BadSample]
    damaged: Sequence[BadSample]
    info: FieldInfo
    first: Sequence[tuple[int, dict[str, Any]]]  # (index, sample) for the contact sheet


def read_split(cfg: Mapping[str, Any], split: str, *, samples: int | None = None, show: int = 24) -> SplitSummary:
    """Read a split of a checked and completed cfg.

    Args:
        cfg: The cfg, as `check.complete` returns it.
        split: "train", "val" or "test".
        samples: Number of samples to read, evenly spaced. Default: all samples.
        show: Number of samples to keep for the contact sheet, evenly spaced.

    Raises:
        ConfigError: The cfg has no such split.
        DataError: The dataset cannot be opened, or no sample can be read.
    """
    if cfg["data"].get(split) is None:
        raise ConfigError(f"cfg.data.{split}: there is no such split. The cfg has no entry for it.")
    dataset = build_dataset(cfg["data"][split], f"cfg.data.{split}")
    loader = cfg["data"][f"{split}_dataloader"]
    stream = Stream(
        dataset,
        batch_size=_READ,
        shuffle=False,
        seed=cfg["seed"],
        pad=True,
        collate_fn=_collate_list,
        name=f"cfg.data.{split}",
        report=_ignore,
        max_bad_frac=1.0,
        sampler=_EvenSampler(samples),
        num_workers=loader["num_workers"],
        **reading_of(cfg),
    )
    fields: dict[str, FieldSummary] = {}
    first: list[tuple[int, dict[str, Any]]] = []
    read = stream.order.plan.count if stream.order.plan else len(dataset)
    wanted = {i * read // max(1, min(show, read)) for i in range(min(show, read))}
    for step, batch in enumerate(stream.epoch(0)):
        ids = stream.indices(0, step).tolist()
        for i, (index, sample) in enumerate(zip(ids, batch["samples"], strict=False)):
            if not batch[WEIGHT][i]:
                continue
            for name, value in tree.items(sample):
                fields.setdefault(name, FieldSummary()).add(name, value)
            if step * _READ + i in wanted:
                first.append((index, sample))
    return SplitSummary(len(dataset), read, fields, stream.bad, stream.damaged, FieldInfo.of(dataset), first)


class _EvenSampler:
    """A sampler of evenly spaced samples."""

    def __init__(self, count: int | None):
        self.count = count

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """The plan of the evenly spaced samples."""
        count = min(size, self.count or size)
        return Plan(count, lambda epoch, generator: torch.arange(count) * size // count)


def _collate_list(samples: list[Any]) -> dict[str, Any]:
    """A collate function that keeps the samples in a list, since their shapes may differ."""
    return {"samples": [tree.map(torch.Tensor.detach, _tensors(wrap_sample(s))) for s in samples]}


def _tensors(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with its arrays converted to tensors."""
    leaves = [torch.as_tensor(v) if type(v).__module__ == "numpy" else v for v in tree.leaves(sample)]
    return tree.unflatten(sample, leaves)


def _ignore(line: str) -> None:
    """Ignore a report of the stream: all bad samples are listed at the end."""


def augmented(cfg: Mapping[str, Any], split: str, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples after the batch augmentations of the cfg's hooks for this split."""
    hooks = [(n, h) for n, h in cfg["hooks"].items() if h["enable"] and h["type"] in ("AugmentHook", AugmentHook)]
    out = [dict(s) for s in samples]
    for name, hook in hooks:
        key = hook.get("field", "input")
        if split not in hook.get("phases", ("train",)):
            continue
        ops = [TRANSFORMS.build(op, f"cfg.hooks.{name}.ops.{i}") for i, op in enumerate(hook["ops"])]
        for i, sample in enumerate(out):
            if not isinstance(sample.get(key), Tensor):
                continue
            torch.manual_seed(mix(cfg["seed"], i))
            value = sample[key][None]
            for op in ops:
                value = op(value)
            sample[key] = value[0]
    return out


def summary_text(summary: SplitSummary, split: str) -> str:
    """The statistics of a split, as a text of several lines."""
    part = "" if summary.read == summary.size else f", {summary.read} of them read"
    lines = [f"{split}: {summary.size} samples{part}"]
    for name, one in summary.fields.items():
        shapes = ", ".join(f"{kind} x {n}" for kind, n in one.kinds.most_common(3))
        more = f" and {len(one.kinds) - 3} more" if len(one.kinds) > 3 else ""
        lines.append(f"  {name:<12} {shapes}{more}")
        if one.count:
            mean, std = (", ".join(f"{v:.4g}" for v in values) for values in one.moments())
            lines.append(f"  {'':<12} mean {mean}   std {std}   from {one.low:.4g} to {one.high:.4g}")
        if one.classes:
            lines += _classes(one.classes, summary.info)
    kinds = Counter(b.kind for b in summary.bad)
    counts = f" ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})" if kinds else ""
    lines.append(
        f"  bad: {len(summary.bad)}{counts}" + (f"; damaged and used: {len(summary.damaged)}" if summary.damaged else "")
    )
    lines += [f"    {b.sample}: {b.kind}: {b.message}" for b in [*summary.bad, *summary.damaged][:_MAX_LINES]]
    rest = len(summary.bad) + len(summary.damaged) - _MAX_LINES
    return "\n".join([*lines, f"    and {rest} more"] if rest > 0 else lines)


def _classes(counts: Counter[int], info: FieldInfo) -> list[str]:
    each = [f"{class_name(c, info.classes)} {n}" for c, n in sorted(counts.items())[:_MAX_LINES]]
    more = f", and {len(counts) - _MAX_LINES} more" if len(counts) > _MAX_LINES else ""
    never = [str(c) for i, c in enumerate(info.classes or ()) if i not in counts]
    without = f"; none of: {', '.join(never[:_MAX_LINES])}" if never else ""
    return [f"  {'':<12} {len(counts)} classes: {', '.join(each)}{more}{without}"]


def run(cfg: Mapping[str, Any], split: Literal["train", "val", "test"], out: Path, samples: int | None, show: int) -> str:
    """Check a cfg, read a split and write its contact sheet to `out`. Returns the text of the statistics."""
    check.check(cfg)
    full = check.complete(cfg)
    summary = read_split(full, split, samples=samples, show=show)
    text = summary_text(summary, split)
    if not summary.first:
        return text
    shown = augmented(full, split, [sample for _, sample in summary.first])
    contact_sheet(shown, [f"#{index}" for index, _ in summary.first], summary.info).save(out)
    return f"{text}\n  {len(shown)} samples, as the model sees them: {out}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ailab.data", description="Print statistics of a dataset in a cfg, list its bad samples, draw a contact sheet."
    )
    parser.add_argument("cfg", help="a Python file that defines `cfg`")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="changes to the cfg, such as data.truncated=fill")
    parser.add_argument("--split", choices=PHASES, default="train", help="the split to read (default: train)")
    parser.add_argument("--out", type=Path, help="path of the contact sheet (default: SPLIT.png)")
    parser.add_argument("--samples", type=int, help="number of samples to read, evenly spaced (default: all)")
    parser.add_argument("--show", type=int, default=24, help="number of samples on the contact sheet (default: 24)")
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = load_cfg(args.cfg, args.overrides)
        print(run(cfg, args.split, args.out or Path(f"{args.split}.png"), args.samples, args.show))
    except AilabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
