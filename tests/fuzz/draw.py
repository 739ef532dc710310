"""A random cfg for each seed: `draw(7).cfg`. The same seed gives the same cfg on every machine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fuzz import components as c

PATTERNS: dict[Any, list[list[str]]] = {  # parameters that may be frozen, by model
    c.Perceptron: [["first.*"], ["last.bias"]],
    c.ConvNet: [["conv.*"], ["head.bias"]],
    c.Transformer: [["place", "norm.*"], ["qkv.*"]],
    c.TwoHeads: [["body.bias"], ["one.*"]],
}
NO_MATRICES: dict[Any, list[str]] = {  # what Muon does not take
    c.Perceptron: ["*.bias"],
    c.ConvNet: ["[!h]*", "head.bias"],
    c.Transformer: ["*.bias", "norm.weight"],
    c.TwoHeads: ["*.bias"],
}
SUBMODULES = {c.Perceptron: "first", c.ConvNet: "conv", c.Transformer: "qkv", c.TwoHeads: "body"}

OPTIMIZERS: list[dict[str, Any]] = [
    dict(type="SGD", lr=0.1, weight_decay=0.01),
    dict(type="SGD", lr=0.1, momentum=0.9),
    dict(type="SGD", lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    dict(type="SGD", lr=0.1, momentum=0.9, dampening=0.3, maximize=False),
    dict(type="Adam", lr=0.02, amsgrad=True, weight_decay=0.01),
    dict(type="AdamW", lr=0.02, weight_decay=0.05),
    dict(type="RMSprop", lr=0.01, momentum=0.9),
    dict(type="RMSprop", lr=0.01, centered=True),
    dict(type="Adafactor", lr=0.1, weight_decay=0.01),
    dict(type="NAdam", lr=0.01, weight_decay=0.0),
    dict(type="RAdam", lr=0.02, weight_decay=0.0),
    dict(type="Adagrad", lr=0.1, weight_decay=0.0),
    dict(type="Adamax", lr=0.02, weight_decay=0.0),
    dict(type="ASGD", lr=0.1, t0=3, weight_decay=0.0),
    dict(type="Adadelta", lr=1.0, weight_decay=0.0),
    dict(type="Rprop", lr=0.01),
    dict(type="Muon", lr=0.1),
    dict(type="LBFGS", lr=0.3, max_iter=3, history_size=4),
    dict(type="LBFGS", lr=0.3, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
]

_CLASSES = torch.tensor(c.CLASS_WEIGHTS)
CLASS_LOSSES: list[dict[str, Any]] = [
    dict(type="CrossEntropyLoss"),
    dict(type="CrossEntropyLoss", weight=_CLASSES),
    dict(type="CrossEntropyLoss", label_smoothing=0.2),
    dict(type="CrossEntropyLoss", ignore_index=2),
    dict(type="CrossEntropyLoss", weight=_CLASSES, label_smoothing=0.1, ignore_index=1),
    dict(type="CrossEntropyLoss", reduction="sum"),
    dict(type="MultiMarginLoss"),
    *[dict(type=loss) for loss in (c.scalar, c.per_sample, c.summed, c.summed_scalar, c.parts, c.scalar_parts)],
    *[dict(type=loss) for loss in (c.total_and_logs, c.WeightedClasses, c.Tempered)],
]
WORD_LOSSES: list[dict[str, Any]] = [
    dict(type="CrossEntropyLoss"),
    dict(type="CrossEntropyLoss", label_smoothing=0.1),
    dict(type="CrossEntropyLoss", weight=torch.linspace(0.5, 2.0, c.WORDS)),
    dict(type="CrossEntropyLoss", reduction="sum"),
    *[dict(type=loss) for loss in (c.scalar, c.per_sample, c.summed, c.parts, c.Tempered)],
]
VALUE_LOSSES: list[dict[str, Any]] = [
    *[dict(type=name) for name in ("MSELoss", "L1Loss", "HuberLoss", c.absolute)],
    dict(type="SmoothL1Loss", beta=0.5),
    dict(type="MSELoss", reduction="sum"),
]


class Dice(random.Random):
    """A random generator that can also say yes."""

    def yes(self, probability: float) -> bool:
        return self.random() < probability


@dataclass(frozen=True)
class Draw:
    """A cfg, and what the laws must know of it."""

    seed: int
    cfg: dict[str, Any]  # without `work_dir`
    steps: int  # of training in an epoch

    @property
    def hooks(self) -> dict[str, dict[str, Any]]:
        return self.cfg["hooks"]

    @property
    def total(self) -> int:
        """Training steps of the run."""
        return self.steps * self.cfg["total_epochs"]

    @property
    def coarse(self) -> bool:
        """Whether it computes in halves."""
        return self.cfg["model"].get("dtype") == "bfloat16" or "amp" in self.hooks

    def with_hooks(self, hooks: Mapping[str, Any], **more: Any) -> Draw:
        return Draw(self.seed, {**self.cfg, **more, "hooks": dict(hooks)}, self.steps)

    def __str__(self) -> str:
        return f"seed {self.seed}: " + said({k: v for k, v in self.cfg.items() if k not in ("compile", "seed")})


def said(value: Any) -> str:
    """A value of a cfg in one line."""
    if isinstance(value, Mapping):
        kind = [said(value["type"])] if "type" in value else []
        return "(" + " ".join(kind + [f"{k}={said(v)}" for k, v in value.items() if k != "type"]) + ")"
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, list):
        return "[" + ", ".join(said(v) for v in value) + "]"
    return getattr(value, "__name__", str(value))


def draw(seed: int, *, drawing: bool = True, halves: bool = True, plain: bool = False) -> Draw:
    """The cfg of a seed.

    Args:
        seed: another one, another cfg.
        drawing: whether a step may draw random numbers: dropout, mixing, augmentation.
        halves: whether a model may be of bfloat16.
        plain: only what a textbook loop knows: no hooks but accumulation, clipping and schedules.
    """
    dice = Dice(seed)
    optimizer = dict(dice.choice(OPTIMIZERS))
    if optimizer["type"] == "Rprop" or "centered" in optimizer:
        halves = False  # 8 bits leave nothing of a sign near 0, or of E[g^2] - E[g]^2
    model, kind = _model(dice, drawing and not plain, halves and not plain)
    if optimizer["type"] in ("LBFGS", "Muon"):
        model["dtype"] = "float64"  # a line search that compares, a gradient rounded to 8 bits: float32 would take other ways
    loss = _loss(dice, model, kind)
    epochs = dice.choice([2, 3])
    data, workflow, steps = _data(dice, model, kind, loss, seed)
    optimizer = _optimizer(dice, optimizer, model["type"], loss)
    schedule = _schedule(dice, epochs, steps, len(workflow) > 1) if dice.yes(0.5) else {}
    hooks = {**_of_gradients(dice, plain), **schedule}
    if not plain:
        hooks |= _of_steps(dice, steps * epochs, model["type"]) | _of_losses(dice, model, kind, drawing)
        hooks |= _metrics(dice, kind, data["train"]["ignored"])
    cfg = dict(
        seed=seed % 7,
        total_epochs=epochs,
        workflow=workflow,
        data=data,
        model=model,
        loss=loss,
        optimizer=optimizer,
        hooks=_shuffled(dice, hooks),
        compile=False,
    )
    return Draw(seed, cfg, steps)


def _model(dice: Dice, drawing: bool, halves: bool) -> tuple[dict[str, Any], str]:
    cls = dice.choice([c.Perceptron, c.Perceptron, c.ConvNet, c.Transformer, c.TwoHeads])
    dtype = dice.choices(["float32", "float64", "bfloat16"], [8, 2, 1 if halves else 0])[0]
    model: dict[str, Any] = dict(type=cls, dtype=dtype)
    if cls is c.ConvNet:
        return {**model, "norm": dice.yes(0.7), "channels_last": dice.yes(0.3)}, "pictures"
    if drawing and dice.yes(0.3):
        model["dropout"] = 0.3
    if cls is c.Transformer:
        return model, "tokens"
    if cls is c.TwoHeads:
        return {**model, **dice.choice([dict(named=True), dict(output_keys=["output", "aux"])])}, "points"
    return {**model, "counting": dice.yes(0.2)}, dice.choice(["points", "points", "values"])


def _loss(dice: Dice, model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if model["type"] is c.TwoHeads:
        return dict(type=dice.choice([c.two_parts, c.two_scalar]))
    loss = dict(dice.choice({"tokens": WORD_LOSSES, "values": VALUE_LOSSES}.get(kind, CLASS_LOSSES)))
    if "weight" in loss:
        loss["weight"] = loss["weight"].to(getattr(torch, model["dtype"]))  # torch refuses another one
    return {**loss, "dtype": model["dtype"]} if loss["type"] is c.WeightedClasses else loss


def _data(
    dice: Dice, model: Mapping[str, Any], kind: str, loss: Mapping[str, Any], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The data of a cfg, its workflow, and the training steps of an epoch."""
    ignores = loss["type"] == "CrossEntropyLoss" and "ignore_index" not in loss
    own = dict(kind=kind, ignored=0.2 if ignores and dice.yes(0.3) else 0.0, dtype=model["dtype"])
    n, batch = dice.choice([13, 17, 22, 24]), dice.choice([4, 6, 8])
    loader: dict[str, Any] = dict(batch_size=batch, drop_last=dice.yes(0.15))
    if dice.yes(0.15):
        loader["shuffle"] = False
    data = dict(train=dict(type=dice.choice([c.BySample, c.InMemory]), n=n, seed=seed % 97, **own), train_dataloader=loader)
    steps = n // batch if loader["drop_last"] else -(-n // batch)
    workflow: list[dict[str, Any]] = [dict(phase="train")]
    if dice.yes(0.25):
        steps = workflow[0]["iters"] = dice.choice([1, 2, steps + 2])
    if dice.yes(0.6):
        entry = dict(type=dice.choice([c.BySample, c.InMemory]), n=dice.choice([5, 9, 11]), seed=seed % 97 + 1, **own)
        data |= dict(val=entry, val_dataloader=dict(batch_size=dice.choice([3, 4, 11])))
        workflow.append(dict(phase="val", **(dict(iters=dice.choice([1, 2])) if dice.yes(0.2) else {})))
    return data, workflow, steps


def _optimizer(dice: Dice, optimizer: dict[str, Any], model: Any, loss: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer with a learning rate, groups and frozen parameters."""
    sums = loss["type"] in (c.summed, c.summed_scalar) or "reduction" in loss
    optimizer["lr"] *= dice.choice([1.0, 0.3]) * (0.1 if sums else 1.0)
    if optimizer["type"] == "Muon":
        return {**optimizer, "freeze": NO_MATRICES[model] + (["loss.factor"] if loss["type"] is c.Tempered else [])}
    if optimizer["type"] == "LBFGS":
        return optimizer
    if dice.yes(0.35):
        own = dice.choice([["weight_decay"], ["lr"], ["weight_decay", "lr"]]) if "weight_decay" in optimizer else ["lr"]
        values = dict(weight_decay=0.02, lr=optimizer["lr"] / 3)
        optimizer["param_groups"] = [dict(params="*bias", **{k: values[k] for k in own})]
    if dice.yes(0.2):
        optimizer["freeze"] = dice.choice(PATTERNS[model])
    return optimizer


def _schedule(dice: Dice, epochs: int, steps: int, has_val: bool) -> dict[str, Any]:
    by = dice.choice(["step", "epoch"])
    n = epochs * (steps if by == "step" else 1)
    scheduler = dice.choice(
        [
            dict(type="StepLR", step_size=dice.choice([1, 2, 3]), gamma=0.5),
            dict(type="MultiStepLR", milestones=[1, 3], gamma=0.3),
            dict(type="ExponentialLR", gamma=0.9),
            dict(type="LinearLR", start_factor=0.2, total_iters=3),
            dict(type="PolynomialLR", total_iters=max(2, n), power=2.0),
            dict(type="CosineAnnealingLR", T_max=n),
            dict(type="CosineAnnealingWarmRestarts", T_0=2),
            dict(type="OneCycleLR", max_lr=0.05),
            dict(type="CyclicLR", base_lr=0.001, max_lr=0.02, step_size_up=2),
            dict(type="WarmupAndCosineAnnealingLR", warmup_steps=2),
            dict(type="SequentialLR", schedulers=_TWO, milestones=[2]),
            dict(type="ChainedScheduler", schedulers=_TWO),
            dict(type="ReduceLROnPlateau", factor=0.5, patience=0),
        ]
    )
    plateau = scheduler["type"] == "ReduceLROnPlateau"
    more = dict(metric=dice.choice(["train_loss", "val_loss"]) if has_val else "train_loss") if plateau else {}
    return dict(lr_scheduler=dict(type="LrSchedulerHook", by=by, scheduler=scheduler, **more))


_TWO = [dict(type="ConstantLR", factor=0.3, total_iters=2), dict(type="ExponentialLR", gamma=0.8)]


def _of_gradients(dice: Dice, plain: bool) -> dict[str, Any]:
    hooks: dict[str, Any] = {}
    if dice.yes(0.35):
        hooks["accumulate"] = dict(type="GradAccumulateHook", n=dice.choice([1, 2, 3, 9]))
    if dice.yes(0.35):
        hooks["clip"] = dict(type="GradClipHook", **dice.choice([dict(max_norm=0.3), dict(max_value=0.05), dict(max_norm=1e9)]))
    if not plain and dice.yes(0.2):
        hooks["sam"] = dict(type="SAMHook", rho=dice.choice([0.0, 0.05, 0.2]), adaptive=dice.yes(0.4))
    if not plain and dice.yes(0.25):
        patterns = dict(patterns={"biases": "*bias"}) if dice.yes(0.5) else {}
        hooks["stats"] = dict(type="GradStatsHook", update=dice.yes(0.6), **patterns)
    return hooks


def _of_steps(dice: Dice, total: int, model: Any) -> dict[str, Any]:
    at, start = dice.randrange(total), dict(use_buffers=dice.yes(0.5), eval=dice.yes(0.6))
    often = dict(every=dice.choice([1, 3]))
    pool: list[tuple[float, str, dict[str, Any]]] = [
        (0.3, "ema", dict(type="EMAHook", decay=dice.choice([0.0, 0.5, 0.9]), warmup=dice.yes(0.5), **start)),
        (0.2, "swa", dict(type="SWAHook", start=1, every=dice.choice([1, 2]), by=dice.choice(["epoch", "step"]), **start)),
        (0.2, "lookahead", dict(type="LookaheadHook", k=dice.choice([1, 2, 3]), alpha=dice.choice([0.5, 1.0]))),
        (0.3, "skip", dict(type="SkipNonFiniteHook", policy="skip", **often)),
        (0.2, "nan", dict(type=c.NaNGradient, at=at)),
        (
            0.2,
            "spike",
            dict(type="SpikeHook", policy=dice.choice(["log", "skip"]), threshold=dice.choice([1.0, 6.0]), window=2),
        ),
        (0.15, "jump", dict(type=c.LossJump, at=at)),
        (
            0.2,
            "freeze",
            dict(type="FreezeHook", params=PATTERNS[model][1], **dice.choice([{}, dict(until=1), dict(until=2, by="step")])),
        ),
    ]
    hooks = {name: entry for probability, name, entry in pool if dice.yes(probability)}
    if "nan" in hooks and not dice.yes(0.1):  # else the run ends there
        hooks["skip"] = pool[3][2]
    return hooks


def _of_losses(dice: Dice, model: Mapping[str, Any], kind: str, drawing: bool) -> dict[str, Any]:
    hooks: dict[str, Any] = {}
    if dice.yes(0.25) and model["dtype"] == "float32":
        fp16 = dict(dtype="fp16", init_scale=2.0 ** dice.choice([4, 16, 40]), growth_interval=dice.choice([2, 2000]))
        hooks["amp"] = dict(type="AMPHook", **dice.choice([dict(dtype="bf16"), fp16]))
    if dice.yes(0.15):
        hooks["remat"] = dict(type="RematHook", modules=[SUBMODULES[model["type"]]])
    per = dice.choice(["batch", "batch", "sample"])
    if dice.yes(0.2) and kind != "tokens":
        hooks["mixup"] = dict(type="MixupHook", alpha=0.4 if drawing else 0.0, per=per, prob=dice.choice([1.0, 0.5]))
    if dice.yes(0.2) and kind == "pictures" and drawing:
        hooks["cutmix"] = dict(type="CutMixHook", per=per)
    if dice.yes(0.2) and kind == "pictures" and drawing:
        hooks["augment"] = dict(type="AugmentHook", ops=[dict(type="BatchFlip")])
    if dice.yes(0.15) and kind in ("points", "pictures"):
        hooks["smoothing"] = dict(type="LabelSmoothingHook", classes=c.CLASSES, smoothing=dice.choice([0.0, 0.1]))
    return hooks


def _metrics(dice: Dice, kind: str, ignored: float) -> dict[str, Any]:
    if dice.yes(0.5):
        return {}
    metrics: dict[str, Any] = {"norm": dict(type=c.Norm, mapping={"pred": "output"})} if dice.yes(0.5) else {}
    both = dict(mapping={"preds": "output", "target": "target"})
    if kind == "values":
        metrics["mse"] = dict(type="torchmetrics.MeanSquaredError", **both)
    else:
        metrics["top1"] = dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"})
    if kind in ("points", "pictures") and not ignored:
        of = dict(num_classes=c.CLASSES, **both)
        if dice.yes(0.5):
            metrics["accuracy"] = dict(type="torchmetrics.classification.MulticlassAccuracy", average="macro", **of)
        if dice.yes(0.25):
            metrics["auroc"] = dict(type="torchmetrics.classification.MulticlassAUROC", probe=False, **of)
    return dict(metrics=dict(type="MetricHook", **metrics))


def _shuffled(dice: Dice, hooks: Mapping[str, Any]) -> dict[str, Any]:
    """The hooks in any order; but an fp16 loss scale must see an overflow before who skips it, or the run is refused."""
    names = list(hooks)
    dice.shuffle(names)
    if hooks.get("amp", {}).get("dtype") == "fp16" and "skip" in names and not dice.yes(0.1):
        low, high = sorted([names.index("amp"), names.index("skip")])
        names[low], names[high] = "amp", "skip"
    return {name: hooks[name] for name in names}
