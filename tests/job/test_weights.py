"""cfg.model.init: a model begins with the weights of a file, and what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import Net, newest_content, tiny_cfg
from torch import Tensor, nn

from ailab.config import check
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.job.assemble import assemble
from ailab.job.weights import init_model

SAVE = dict(checkpoint=dict(type="CheckpointHook"))


def values(seed: int = 7, width: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = Net(width)
    return {n: torch.rand_like(t) + 0.1 if t.is_floating_point() else t + 5 for n, t in model.state_dict().items()}


def begun(work_dir: Path, init: dict[str, Any], model: Any = Net, **hooks: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The first model state of a run, and what it says."""
    cfg = {**tiny_cfg(work_dir, **hooks), "model": dict(type=model, init=init)}
    check.check(cfg)
    lines: list[str] = []
    job = assemble(check.complete(cfg), torch.device("cpu"), say=lines.append)
    return job.info.model_state(job.state), lines


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


FILES: dict[str, tuple[str, Callable[[Any, Path], object]]] = {
    "a state_dict": ("w.pt", torch.save),
    "of DDP and torch.compile": ("w.pth", lambda s, f: torch.save({f"module._orig_mod.{n}": t for n, t in s.items()}, f)),
    "in a trainer's file": (
        "w.ckpt",
        lambda s, f: torch.save({"loss": torch.ones(()), "state_dict": s, "optimizer": {"lr": 1.0}}, f),
    ),
    "safetensors": ("w.safetensors", save_file),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_run_begins_with_the_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    """Parameters and buffers are those of the file, in whatever way people keep a state_dict."""
    name, write = FILES[kind]
    write(values(), tmp_path / name)
    state, lines = begun(tmp_path / "run", dict(from_=str(tmp_path / name)))
    assert same(state, values())
    assert lines[0] == f"weights   {tmp_path / name}" and lines[1].split()[:2] == ["matched", str(len(state))]


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000015"])
def test_a_run_begins_where_another_ended(place: str, tmp_path: Path) -> None:
    """The work_dir of a run, its folder of checkpoints, or one of them: the model as that run evaluates it, with its EMA."""
    fit(tiny_cfg(tmp_path / "a", ema=dict(type="EMAHook", decay=0.5), **SAVE))
    state, lines = begun(tmp_path / "b", dict(from_=tmp_path / "a" / place))
    content = newest_content(tmp_path / "a")
    assert same(state, content["model_state"])
    assert not torch.equal(state["last.weight"], content["state"]["params"]["last.weight"])
    assert lines[0].endswith("step_00000015 (step 15)")


class Wide(nn.Module):
    """A model that has the other one as a part, under another name, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net()
        self.head = nn.Linear(3, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.encoder(input))


def test_a_part_of_a_file_becomes_a_part_of_a_model(tmp_path: Path) -> None:
    """part, rename and skip, in this order; a tensor that is skipped is what it would be without the file."""
    whole = {f"backbone.{n}": t for n, t in values().items()} | {"decoder.weight": torch.zeros(2)}
    torch.save(whole, tmp_path / "w.pt")
    plain, _ = begun(tmp_path / "a", dict(from_=tmp_path / "w.pt", part="backbone"))
    assert same(plain, values())
    init = dict(from_=tmp_path / "w.pt", part="backbone", rename={"*": "encoder.*"}, skip=["head.*", "encoder.last.bias"])
    state, lines = begun(tmp_path / "b", init, Wide)
    untouched, _ = begun(
        tmp_path / "c", dict(from_=tmp_path / "w.pt", strict=False, rename={"backbone.first.*": "encoder.first.*"}), Wide
    )
    right = {f"encoder.{n}": t for n, t in values().items()}
    assert all(torch.equal(state[n], right[n]) for n in right if n != "encoder.last.bias")
    assert all(torch.equal(state[n], untouched[n]) for n in ("head.weight", "head.bias", "encoder.last.bias"))
    assert [line.split()[:2] for line in lines[1:3]] == [["matched", "8"], ["skipped", "3"]]


def test_the_first_pattern_renames_and_each_star_keeps_its_text(tmp_path: Path) -> None:
    """`*` stands for any text, as in torchvision's and timm's names; a name that no pattern matches stays."""
    model = nn.ModuleDict({"blocks": nn.ModuleDict({"first": nn.Linear(8, 4)})})
    torch.save({"layer1.first.w": torch.ones(4, 8), "layer1.first.b": torch.full((4,), 2.0)}, tmp_path / "w.pt")
    rename = {"layer*.*.w": "blocks.*.weight", "*.b": "*.bias"}
    with pytest.raises(
        ConfigError, match=r"cfg\.model\.init\.rename: 'layer\*\.\*\.w' -> 'blocks\.\*\.weight': as many \* on both"
    ):
        init_model(model, dict(from_=tmp_path / "w.pt", part=None, rename=rename, skip=[], strict=True))
    rename = {"layer1.*.w": "blocks.*.weight", "layer1.*.b": "blocks.*.bias", "*": "y.*"}
    init_model(model, dict(from_=tmp_path / "w.pt", part=None, rename={**rename, "layer1.*": "never.*"}, skip=[], strict=True))
    assert torch.equal(model["blocks"]["first"].weight, torch.ones(4, 8))
    assert torch.equal(model["blocks"]["first"].bias, torch.full((4,), 2.0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "out.weight"])
def test_a_tied_tensor_needs_one_of_its_names(name: str, tmp_path: Path) -> None:
    """Files of other libraries keep tied weights once."""
    torch.save({name: torch.ones(5, 3)}, tmp_path / "w.pt")
    model = Tied()
    init_model(model, dict(from_=tmp_path / "w.pt", part=None, rename={}, skip=[], strict=True))
    assert torch.equal(model.embed.weight, torch.ones(5, 3)) and model.out.weight is model.embed.weight


def test_values_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    """A file of halves fills a model of floats."""
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in values().items()}, tmp_path / "w.pt")
    state, _ = begun(tmp_path / "run", dict(from_=tmp_path / "w.pt"))
    assert torch.equal(state["last.weight"], values()["last.weight"].half().float())


def without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in values().items() if n != name}


MISFITS = {
    "missing": (without("last.bias"), r"missing +1  last\.bias"),
    "left over": ({**values(), "aux.weight": torch.ones(2)}, r"left over +1  aux\.weight"),
    "other shape": (
        {**values(), "last.weight": torch.ones(5, 8)},
        r"other shape +1  last\.weight float32 \(5, 8\) for float32 \(3, 8\)",
    ),
    "quantized": ({**values(), "last.weight": torch.ones(3, 8, dtype=torch.int8)}, r"last\.weight int8 \(3, 8\) for float32"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_an_error_or_said(misfit: str, tmp_path: Path) -> None:
    """By default an error that names the tensor and the ways out; with strict=False a line, and the rest is loaded."""
    found, words = MISFITS[misfit]
    torch.save(found, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=rf"(?s)^cfg\.model\.init: not every tensor fits\..*{words}.*strict=False"):
        begun(tmp_path / "a", dict(from_=tmp_path / "w.pt"))
    state, lines = begun(tmp_path / "b", dict(from_=tmp_path / "w.pt", strict=False))
    assert torch.equal(state["first.weight"], values()["first.weight"])
    assert len(lines[1:]) >= 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing fits": (dict(part="inner", strict=False), r"^cfg\.model\.init: nothing fits"),
    "no such part": (dict(part="innr"), r"has no sub-module 'innr'.*inner"),
    "no such name": (dict(rename={"frst.*": "first.*"}), r"cfg\.model\.init\.rename: no tensor of the file matches 'frst\.\*'"),
    "two of one name": (
        dict(rename={"first.weight": "last.weight"}),
        r"'first\.weight' and 'last\.weight' would both be 'last\.weight'",
    ),
    "skips nothing": (dict(skip=["haed.*"]), r"cfg\.model\.init\.skip\[0\]: no tensor of the model or the file matches"),
    "no file": (dict(from_="nowhere.pt"), r"cfg\.model\.init\.from_: nowhere\.pt cannot be read: No such file"),
    "an empty folder": (dict(from_="."), r"is no checkpoint, and there is none in it"),
    "code": (dict(from_="code.pt"), r"code\.pt is no file of tensors alone"),
    "no archive": (dict(from_="text.pt"), r"text\.pt is no file of tensors alone"),
    "no state_dict": (dict(from_="other.pt"), r"holds a dict with epoch, history, and no state_dict"),
    "a key": (dict(form="w.pt"), r"cfg\.model\.init\.form: .*Did you mean 'from_'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is trained, in a sentence that begins with its place."""
    monkeypatch.chdir(tmp_path)
    torch.save({**values(), "inner.x": torch.ones(1)}, "w.pt")
    torch.save(Net(), "code.pt")
    Path("text.pt").write_text("weights")
    torch.save({"epoch": 1, "history": [1.0]}, "other.pt")
    init, words = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        begun(tmp_path / "run", {"from_": "w.pt", **init})


def test_a_run_that_goes_on_does_not_read_the_file_again(tmp_path: Path) -> None:
    """Its checkpoint has the weights: the file may be gone. What the model began with is part of what the run is."""
    torch.save(values(), tmp_path / "w.pt")
    hooks = dict(**SAVE, resume=dict(type="ResumeHook"))
    cfg = {**tiny_cfg(tmp_path / "run", **hooks), "model": dict(type=Net, init=dict(from_=str(tmp_path / "w.pt")))}
    whole = fit({**cfg, "work_dir": str(tmp_path / "whole")})
    fit({**cfg, "total_epochs": 2})
    (tmp_path / "w.pt").unlink()
    resumed = fit(cfg)
    assert all(torch.equal(resumed.state.params[n], whole.state.params[n]) for n in whole.state.params)
    with pytest.raises(ConfigError, match=r"cfg\.model\.init\.from_: .* -> 'other\.pt'"):
        fit({**cfg, "model": dict(type=Net, init=dict(from_="other.pt"))})


def test_there_is_one_place_to_start_from(tmp_path: Path) -> None:
    """A whole checkpoint has weights too: with both, one of them would not be read."""
    hooks = dict(resume=dict(type="ResumeHook", resume_from="work_dir/a"))
    with pytest.raises(
        ConfigError, match=r"cfg\.model\.init: resume_from starts from a whole checkpoint.*Leave one of them out"
    ):
        begun(tmp_path, dict(from_="w.pt"), **hooks)


@pytest.mark.parametrize("sync", ["ddp", "graph"])
def test_ranks_begin_with_the_file_of_one_process(ranks: Any, sync: str, tmp_path: Path) -> None:
    """Two ranks train as one process from the same file."""
    from ranks import Net as Wider
    from ranks import compared, config

    torch.manual_seed(3)
    torch.save(Wider().state_dict(), tmp_path / "w.pt")
    cfg = config(sync=sync)
    cfg["model"] = {**cfg["model"], "init": dict(from_=str(tmp_path / "w.pt"))}
    assert max(compared(ranks, 2, cfg)) < 1e-9
