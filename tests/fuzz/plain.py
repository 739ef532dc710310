"""A textbook training loop in plain torch, which knows nothing of ailab but a cfg: torch's own optimizers and schedulers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fuzz import components as c
from fuzz.draw import Draw
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from ailab.optim import WarmupAndCosineAnnealingLR

Ratio = tuple[Tensor, float]  # what is minimised of a batch, and the number that it counts for in a mean over batches

# The losses of `components`, as one number of a batch: means over its samples, and sums where the loss is one.
BY_HAND: dict[Any, Callable[..., Tensor]] = {
    c.absolute: lambda out, y, _: (out - y).abs().mean(),
    c.scalar: lambda out, y, _: functional.cross_entropy(out, y),
    c.per_sample: lambda out, y, _: functional.cross_entropy(out, y),
    c.summed: lambda out, y, _: functional.cross_entropy(out, y, reduction="sum") / (out[0, 0].numel()),
    c.summed_scalar: lambda out, y, _: functional.cross_entropy(out, y, reduction="sum") / (out[0, 0].numel()),
    c.parts: lambda out, y, _: functional.cross_entropy(out, y) + 0.01 * out.square().mean(),
    c.scalar_parts: lambda out, y, _: functional.cross_entropy(out, y) + 0.01 * out.square().mean(),
    c.total_and_logs: lambda out, y, _: functional.cross_entropy(out, y) + 0.01 * out.square().mean(),
    c.two_parts: lambda out, y, aux: functional.cross_entropy(out, y) + 0.3 * functional.cross_entropy(aux, y % 3),
    c.two_scalar: lambda out, y, aux: functional.cross_entropy(out, y) + 0.3 * functional.cross_entropy(aux, y % 3),
}


class Plain:
    """A model, a loss, an optimizer and a schedule, trained batch by batch."""

    def __init__(self, draw: Draw, first: Mapping[str, Tensor]):
        self.draw, cfg = draw, draw.cfg
        own = ("type", "output_keys", "channels_last")  # torch's LBFGS does not take such a layout, which changes no value
        self.model: nn.Module = cfg["model"]["type"](**{k: v for k, v in cfg["model"].items() if k not in own})
        self.loss, self.factor = cfg["loss"], torch.tensor(0.0)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(first.get(name, tensor))
        self.params: dict[str, Tensor] = dict(self.model.named_parameters())
        if "loss.factor" in first:
            self.factor = self.params["loss.factor"] = first["loss.factor"].clone().requires_grad_()
        self.optimizer = self._optimizer(dict(cfg["optimizer"]))
        self.scheduler = self._scheduler()

    def _optimizer(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        """The class of torch.optim over groups: what no pattern matches first, then one for each entry."""
        patterns, frozen = settings.pop("param_groups", []), settings.pop("freeze", [])
        for name, param in self.params.items():
            param.requires_grad_(not any(fnmatch.fnmatch(name, pattern) for pattern in frozen))
        rest = {n: p for n, p in self.params.items() if p.requires_grad}
        self.trained = list(rest.values())
        groups: list[dict[str, Any]] = []
        for entry in patterns:
            mine = [n for n in rest if fnmatch.fnmatch(n, entry["params"])]
            groups.append({**entry, "params": [rest.pop(n) for n in mine]})
        cls = getattr(torch.optim, settings.pop("type"))
        return cls(([{"params": list(rest.values())}] if rest else []) + [g for g in groups if g["params"]], **settings)

    def _scheduler(self) -> Any:
        hook = self.draw.hooks.get("lr_scheduler")
        if hook is None:
            return None
        self.by = "plateau" if hook["scheduler"]["type"] == "ReduceLROnPlateau" else hook["by"]
        total = self.draw.cfg["total_epochs"] * (self.draw.steps if hook["by"] == "step" else 1)
        return self._built(dict(hook["scheduler"]), total)

    def _built(self, settings: dict[str, Any], total: int) -> Any:
        name = settings.pop("type")
        if "schedulers" in settings:
            settings["schedulers"] = [self._built(dict(s), total) for s in settings["schedulers"]]
        if name == "ChainedScheduler":
            return lr_scheduler.ChainedScheduler(**settings, optimizer=self.optimizer)
        if name in ("OneCycleLR", "WarmupAndCosineAnnealingLR"):
            settings["total_steps"] = total
        if name in ("OneCycleLR", "CyclicLR"):
            settings["cycle_momentum"] = False
        return getattr(lr_scheduler, name, WarmupAndCosineAnnealingLR)(self.optimizer, **settings)

    def ratio(self, batch: Mapping[str, Tensor]) -> Ratio:
        """The loss of a batch as torch computes it, and what it counts for beside other batches."""
        result, target = self.model(batch["input"]), batch["target"]
        parts = list(result.values()) if isinstance(result, dict) else list(result) if isinstance(result, tuple) else [result]
        out, aux, count = parts[0], parts[-1], float(len(target))
        kind = self.loss["type"]
        if kind is c.WeightedClasses:
            return _cross_entropy(out, target, weight=torch.tensor(c.CLASS_WEIGHTS, dtype=out.dtype))
        if kind is c.Tempered:
            return functional.cross_entropy(out * self.factor, target), count
        if kind in BY_HAND:
            return BY_HAND[kind](out, target, aux), count
        settings = {k: v for k, v in self.loss.items() if k != "type"}
        if kind == "CrossEntropyLoss" and "reduction" not in settings:
            return _cross_entropy(out, target, **settings)
        return getattr(nn, kind)(**settings)(out, target), count

    def step(self, batch: Mapping[str, Tensor]) -> Ratio:
        """One update; the loss before it. Of several evaluations for one update, the first one tells buffers what it saw."""
        found: list[Ratio] = []
        buffers: dict[str, Tensor] = {}

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss, count = self.ratio(batch)
            loss.backward()
            found.append((loss.detach(), count))
            buffers.update({n: b.clone() for n, b in self.model.named_buffers() if n not in buffers})
            self._clip()
            return loss.detach()

        self.model.train()
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        self.model.load_state_dict(buffers, strict=False)
        if self.scheduler is not None and self.by == "step":
            self.scheduler.step()
        return found[0]

    def _clip(self) -> None:
        clip = self.draw.hooks.get("clip", {})
        live = [p for p in self.trained if p.grad is not None]
        if "max_norm" in clip:
            nn.utils.clip_grad_norm_(live, clip["max_norm"])
        elif clip:
            nn.utils.clip_grad_value_(live, clip["max_value"])

    def evaluate(self, batches: Sequence[Mapping[str, Tensor]]) -> float:
        """The mean loss of batches in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return mean([self.ratio(batch) for batch in batches])

    def end_epoch(self, results: Mapping[str, float]) -> None:
        """What a schedule by epochs does; one that monitors a result is given it."""
        if self.scheduler is not None and self.by == "plateau":
            self.scheduler.step(results[self.draw.hooks["lr_scheduler"]["metric"]])
        elif self.scheduler is not None and self.by == "epoch":
            self.scheduler.step()


def _cross_entropy(out: Tensor, target: Tensor, weight: Tensor | None = None, **settings: Any) -> Ratio:
    """Cross-entropy over the weights of its targets; 0 where no target counts."""
    total = functional.cross_entropy(out, target, weight=weight, reduction="sum", **settings)
    counted = target[target != settings.get("ignore_index", c.IGNORED)]
    count = float(counted.numel() if weight is None else weight[counted].sum())
    return (total / count if count else 0.0 * total), count


def mean(ratios: Sequence[Ratio]) -> float:
    """The mean of losses, each by what it counts for."""
    counts = sum(count for _, count in ratios)
    return sum(float(loss) * count for loss, count in ratios) / counts if counts else 0.0
