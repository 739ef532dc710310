"""Laws of the check: every key of a cfg is checked before anything is built, and all problems come at once."""

import copy
import time

import pytest
from torch import nn

from ailab.config.check import check, complete
from ailab.errors import ConfigError
from ailab.registry import HOOKS, LR_SCHEDULERS, METRICS

# Components of the seed's quick start, named apart from ailab's own so that these tests depend on none of those.


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    monkeypatch.setattr(HOOKS, "package", "ailab.core")


class SeedModel(nn.Module):
    def __init__(self, in_feats: int, out_feats: int):
        super().__init__()
        self.linear = nn.Linear(in_feats, out_feats)

    def forward(self, input):
        return self.linear(input)


class SeedData:
    def __init__(self, data_path: str):
        self.data = data_path


class SeedLoss(nn.Module):
    def forward(self, output, target): ...


def seed_accuracy(topk: int = 1): ...


def seed_metrics(*, run, name, **metrics): ...


def _check_metrics(entry, path):
    keys = {"mapping": dict[str, str], "phases": list[str]}
    return [p for k, v in entry.items() for p in METRICS.check(v, f"{path}.{k}", keys=keys)]


seed_metrics.check = _check_metrics


def seed_logger(interval: int = 50, log_dir: str | None = None, log_items: dict[str, str] | None = None, *, run): ...


def seed_checkpoint(interval: int = 1, keep: int = 3, *, run, name): ...


def seed_scheduler(scheduler: dict, *, run): ...


def _check_scheduler(entry, path):
    strange = [f"{path}.{k}: takes scheduler alone" for k in entry if k != "scheduler"]
    return strange + LR_SCHEDULERS.check(entry.get("scheduler"), f"{path}.scheduler", injected=("optimizer",))


seed_scheduler.check = _check_scheduler


def seed_amp(dtype: str = "bfloat16", name: str = "amp"): ...


def seed_wandb(init_args: dict | None = None, *, run): ...


def realistic() -> dict:
    """The seed's quick start with a little more of everything."""
    return dict(
        seed=42,
        work_dir="./work_dir",
        dist=dict(backend="nccl", init_method="env://", sync="ddp", timeout_s=60),
        workflow=[{"phase": "train", "iters": 100}, {"phase": "val", "amp": dict(enable=False)}],
        total_epochs=50,
        compile=dict(cut="step", mode="default", donate=False),
        resume_lr="initial",
        data=dict(
            train=dict(type=SeedData, data_path="train.pkl"),
            val=dict(type=SeedData, data_path="val.pkl"),
            train_dataloader=dict(batch_size=32, num_workers=4, pin_memory=True, prefetch_factor=4, drop_last=True),
            val_dataloader=dict(batch_size=64, num_workers=2, persistent_workers=True),
            max_bad_frac=0.1,
        ),
        model=dict(type=SeedModel, in_feats=128, out_feats=10, mapping={"input": "input"}, output_keys=["output"]),
        loss=dict(type=SeedLoss, mapping={"output": "output", "target": "target"}),
        optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95), param_groups=[], freeze=["head.*"]),
        hooks=dict(
            metrics=dict(
                type=seed_metrics,
                top1=dict(type=seed_accuracy, topk=1, mapping={"pred": "output", "label": "target"}, phases=["train", "val"]),
            ),
            logger=dict(type=seed_logger, interval=100, log_dir="./logs", log_items=dict(lr="optimizer.param_groups.0.lr")),
            checkpoint=dict(type=seed_checkpoint, interval=1, keep=5),
            lr_scheduler=dict(type=seed_scheduler, scheduler=dict(type="CosineAnnealingLR", T_max=10, eta_min=0.0)),
            amp=dict(type=seed_amp, enable=False, dtype="float16"),
            wandb=dict(type=seed_wandb, init_args=dict(project="my_proj", name="exp1")),
        ),
    )


def at(cfg, path):
    for key in path:
        cfg = cfg[key]
    return cfg


FREE = {  # where any name will do
    ("hooks",),
    ("hooks", "metrics", "top1", "mapping"),
    ("hooks", "logger", "log_items"),
    ("hooks", "wandb", "init_args"),
}


def keys_of(node, path=()):
    """The path of every key of a cfg but those that the user is free to choose."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        here = (*path, key)
        if isinstance(key, str) and path not in FREE and here != ("hooks", "metrics", "top1"):
            yield here
        yield from keys_of(value, here)


def typos(word):
    """Four edits of one character: one dropped, doubled, replaced, and two swapped."""
    middle = len(word) // 2
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    return {word[:-1], word[:middle] + word[middle] + word[middle:], word[:middle] + "q" + word[middle + 1 :], swapped} - {word}


def misspelt():
    """(path, cfg) with one key misspelt each, then one value that is a name."""
    for path in keys_of(realistic()):
        for typo in sorted(typos(path[-1])):
            cfg = realistic()
            parent = at(cfg, path[:-1])
            parent[typo] = parent.pop(path[-1])
            yield ".".join(map(str, ("cfg", *path[:-1], typo))), cfg
    for path in (
        *(("dist", "backend"), ("dist", "sync"), ("optimizer", "type"), ("workflow", 0, "phase"), ("workflow", 1, "phase")),
        *(("hooks", "lr_scheduler", "scheduler", "type"), ("resume_lr",), ("compile", "cut")),
    ):
        for typo in sorted(typos(at(realistic(), path)) - {"Adam"}):  # that one is another optimizer
            cfg = realistic()
            at(cfg, path[:-1])[path[-1]] = typo
            yield ".".join(map(str, ("cfg", *path))), cfg


def problems_of(cfg) -> str:
    with pytest.raises(ConfigError) as e:
        check(cfg)
    return str(e.value)


def test_a_correct_cfg_passes():
    """The seed's quick start passes, with hooks as a dict or as a list."""
    cfg = realistic()
    before = copy.deepcopy({k: v for k, v in cfg.items() if k != "hooks"})
    check(cfg)
    cfg["hooks"] = [{**v, "name": k} for k, v in cfg["hooks"].items()]
    check(cfg)
    assert {k: v for k, v in cfg.items() if k != "hooks"} == before


def test_every_single_typo_is_rejected_at_its_path_and_fast():
    """One wrong character in any key or in any value that is a name is an error that names the place."""
    start, missed, cases = time.monotonic(), [], list(misspelt())
    for path, cfg in cases:
        try:
            check(cfg)
            missed.append((path, "accepted"))
        except ConfigError as e:
            parent = path.rpartition(".")[0]
            known = f"{path}:" in str(e) or (f"{parent}: there is no `type`" in str(e) and path.rpartition(".")[2] in str(e))
            missed += [] if known else [(path, str(e))]
    assert len(cases) >= 200
    assert missed == []
    assert time.monotonic() - start < 5


def test_all_problems_are_reported_at_once():
    """One error lists every problem with its path; a disabled hook is checked like any other; each has at most 3 lines."""
    cfg = realistic()
    cfg["totl_epochs"] = cfg.pop("total_epochs")
    cfg["model"]["in_feat"] = cfg["model"].pop("in_feats")
    cfg["optimizer"]["lr"] = "fast"
    cfg["data"]["train_dataloader"]["batch_size"] = 0
    cfg["hooks"]["amp"]["dtyp"] = "float16"
    cfg["workflow"].append({"phase": "test"})
    said = problems_of(cfg)
    for part in (
        "cfg.totl_epochs: a cfg takes no 'totl_epochs'.\n  Did you mean 'total_epochs'?",
        "cfg.model.in_feat: SeedModel takes no 'in_feat'.\n  Did you mean 'in_feats'? SeedModel takes: in_feats,",
        "cfg.model.in_feats: SeedModel needs 'in_feats'",
        "cfg.optimizer.lr: expected float | Tensor, got str 'fast'.",
        "cfg.data.train_dataloader.batch_size: expected int >= 1, got int 0.",
        "cfg.hooks.amp.dtyp: seed_amp takes no 'dtyp'.\n  Did you mean 'dtype'? seed_amp takes: dtype, enable.",
        "cfg.workflow.2: the phase 'test' needs cfg.data.test, which is not there.",
    ):
        assert part in said
    assert max(len(problem.splitlines()) for problem in said.split("\ncfg.")) <= 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "cfg.model: expected dict"),
        ({"total_epochs": 0}, "cfg.total_epochs: expected int >= 1, got int 0."),
        ({"total_epochs": True}, "cfg.total_epochs: expected int >= 1, got True."),
        ({"optimizer": None}, "cfg.workflow.0: the phase 'train' needs cfg.optimizer"),
        ({"workflow": []}, "cfg.workflow: there is no phase to run."),
        ({"workflow": ["train"]}, "cfg.workflow: expected list[dict[str, Any]]"),
        ({"workflow": [{"phase": "train", "amp": {"enabel": False}}]}, "cfg.workflow.0.amp.enabel: "),
        ({"workflow": [{"phase": "train", "ampp": {"enable": False}}]}, "Did you mean 'amp'?"),
        ({"data": {"train": {}}}, "cfg.data.train: there is no `type`."),
        ({"hooks": {"amp": True}}, "cfg.hooks.amp: expected dict(type=...) of a hook, got bool True."),
        ({"hooks": [{"type": seed_amp}, {"type": seed_amp}]}, "cfg.hooks.1: the hook at cfg.hooks.0 is called 'seed_amp' too."),
        ({"hooks": {"amp": {"type": "no.such.Hook"}}}, "cfg.hooks.amp.type: there is no module 'no"),
        ({"compile": "always"}, "cfg.compile: expected 'auto' | bool | dict[str, Any], got str 'always'."),
        (
            {"dist": {"backend": "ncll"}},
            "cfg.dist.backend: expected 'nccl' | 'gloo' | None, got str 'ncll'.\n  Did you mean 'nccl'?",
        ),
        ({"resume_from": "work_dir/a"}, "cfg.resume_from: no hook reads it. Add hooks.resume=dict(type='ResumeHook')."),
        ({"resume_lr": -1.0}, "cfg.resume_lr: expected 'keep' | 'initial' | float >= 0, got float -1.0."),
    ],
)
def test_what_does_not_fit_together_is_reported(change, said):
    """Values out of range, phases without what they need and entries of the wrong kind are errors."""
    assert said in problems_of({**realistic(), **change})


def test_a_cfg_without_a_model_or_data_is_refused():
    """A cfg must have `model` and `data`."""
    said = problems_of({})
    assert "cfg.model: a cfg needs 'model', and it was not given." in said
    assert "cfg.data: a cfg needs 'data', and it was not given." in said


def test_mapping_and_output_names_are_checked_without_building():
    """`mapping` of a module class is checked against its `forward`; an output name cannot be there twice."""
    cfg = realistic()
    cfg["model"].update(mapping={"inptu": "input"}, output_keys=["a", "a"])
    cfg["loss"]["mapping"]["outputs"] = "output"
    said = problems_of(cfg)
    assert "cfg.model.mapping.inptu: SeedModel has no parameter 'inptu'.\n  Did you mean 'input'?" in said
    assert "cfg.loss.mapping.outputs: SeedLoss has no parameter 'outputs'." in said
    assert "cfg.model.output_keys: 'a' is there twice." in said


def test_objects_are_types():
    """A module that is already built passes, and a model that gives its own loss needs none."""
    cfg = {**realistic(), "model": dict(type=nn.Linear(1, 1), output_keys=["loss"]), "loss": None}
    check(cfg)
    cfg["model"]["bias"] = True
    assert "which is already built," in problems_of(cfg)


def test_complete_fills_every_default_and_changes_nothing():
    """Defaults have one home; what the cfg says stays, hooks become a dict in their order, the argument is untouched."""
    cfg = dict(
        model=dict(type=nn.Linear),
        data=dict(train=dict(type=SeedData), val=dict(type=SeedData), train_dataloader=dict(batch_size=8)),
        hooks=[dict(type="EMAHook"), dict(type=seed_amp, name="half", enable=False)],
    )
    before = copy.deepcopy(cfg)
    full = complete(cfg)
    assert cfg == before
    assert full["workflow"] == [{"phase": "train", "iters": None}, {"phase": "val", "iters": None}]
    assert full["hooks"] == {"ema": {"enable": True, "type": "EMAHook"}, "half": {"enable": False, "type": seed_amp}}
    assert list(full["hooks"]) == ["ema", "half"]
    assert full["dist"] == {"backend": None, "init_method": "env://", "sync": "ddp", "shard": None, "timeout_s": 600}
    assert full["data"]["train_dataloader"]["batch_size"] == 8
    assert full["data"]["val_dataloader"]["batch_size"] == 1
    assert full["model"] == {"type": nn.Linear, "mapping": {}, "output_keys": ["output"], "init": None}
    assert (full["seed"], full["compile"], full["resume_lr"], full["loss"]) == (0, "auto", "keep", None)
    assert complete(full) == full
    assert complete(cfg)["dist"] is not full["dist"]
