"""model.json: plain data in each checkpoint, covered by its hashes, checked on reading, and nothing in it is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import encoded, photo
from tiny import tiny_cfg
from torch import nn

from ailab.errors import CheckpointError, ConfigError
from ailab.fit import fit
from ailab.job.recipe import Recipe, read_recipe
from ailab.workdir.checkpoint import load
from ailab.workdir.manifest import DamagedError

RESIZE = [dict(type="Resize", size=[24, 24]), dict(type="ToDtype", dtype="float32", scale=True)]


def photos(root: Path) -> str:
    for i in range(8):
        path = root / ("ants" if i % 2 else "bees") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i, (32, 40)), "JPEG"))
    return str(root)


def photo_cfg(folder: Path, **model: Any) -> dict[str, Any]:
    entry = dict(type="ClassificationImageDataset", source=photos(folder / "set"), transform=RESIZE)
    return dict(
        seed=0,
        work_dir=str(folder / "run"),
        data=dict(train=entry, val=entry, train_dataloader=dict(batch_size=4), val_dataloader=dict(batch_size=4)),
        model={"type": "ConvNet", "in_channels": 3, "num_classes": 2, "widths": (4, 8), "depth": 1, **model},
        loss=dict(type="CrossEntropyLoss"),
        optimizer=dict(type="SGD", lr=0.01),
        hooks=dict(checkpoint=dict(type="CheckpointHook")),
        compile=False,
    )


def saved(cfg: dict[str, Any]) -> Path:
    fit(cfg)
    return max((Path(cfg["work_dir"]) / "checkpoints").glob("step_*"))


def test_a_checkpoint_says_what_its_model_is(tmp_path: Path) -> None:
    """A model that is built of model.json alone takes the saved weights, strictly; inputs, outputs and classes are named."""
    path = saved(photo_cfg(tmp_path))
    content, checkpoint = load(path)
    assert checkpoint.model == (path / "model.json").read_bytes()
    recipe = read_recipe(checkpoint.model, path)
    recipe.build().load_state_dict(content["model_state"])
    assert recipe.classes == ["ants", "bees"] and recipe.outputs == ["output"] and recipe.missing == []
    assert recipe.fields == {"input": {"shape": [3, 24, 24], "dtype": "float32"}}
    assert recipe.reading == {"field": "input", "image": True, "transform": RESIZE}
    assert Recipe(**json.loads(recipe.to_json())) == recipe


def test_what_is_no_plain_data_is_said_and_comes_from_the_cfg(tmp_path: Path) -> None:
    """A class that is given as an object is named as missing; with the cfg the recipe is whole, without it an error says so."""
    cfg = {**tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook"))}
    path = saved(cfg)
    data = (path / "model.json").read_bytes()
    assert json.loads(data)["missing"] == ["cfg.model.type"]
    with pytest.raises(ConfigError, match=r"model.json cannot hold cfg.model.type: they are objects. Give the cfg too"):
        read_recipe(data, path)
    read_recipe(data, path, cfg).build().load_state_dict(load(path)[0]["model_state"])


def test_a_secret_does_not_travel(tmp_path: Path) -> None:
    """A key that names a secret is left out, and its place is said."""
    recipe = {**json.loads(_good()), "reading": {"field": "input", "image": False}}
    from ailab.job.recipe import MODELS, _plain_entry

    missing: list[str] = []
    assert _plain_entry({"type": "MLP", "more": {"api_key": "x", "size": 1}}, "cfg.model", MODELS, missing)["more"] == {
        "size": 1
    }
    assert missing == ["cfg.model.more.api_key"] and recipe["missing"] == []


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "added"])
def test_a_damaged_model_json_is_a_damaged_checkpoint(tmp_path: Path, damage: str) -> None:
    """A flipped bit, a cut, a missing or a surplus file: the checkpoint is refused as damaged."""
    path = saved(tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")))
    file = path / "model.json"
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "added":
        (path / "other.json").write_bytes(data)
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(DamagedError):
        load(path)


def _good(**change: Any) -> bytes:
    model = dict(type="MLP", sizes=[2, 2])
    recipe = Recipe(model, {}, ["output"], {}, ["output"], {"field": "input", "image": False})
    return json.dumps({**json.loads(recipe.to_json()), **change}).encode()


def test_a_model_json_of_one_s_own_is_read(tmp_path: Path) -> None:
    """The forged ones below are refused for what they say, not for their form."""
    assert isinstance(read_recipe(_good(), tmp_path).build(), nn.Module)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, CheckpointError, "has no model.json: an earlier ailab wrote it"),
        (b"{", CheckpointError, "cannot be parsed"),
        (b"[" * 100_000, CheckpointError, "cannot be parsed"),
        (b"[]", CheckpointError, "is not what ailab writes"),
        (_good(format=2), CheckpointError, "format 2 of model.json is newer than 1"),
        (_good(reading=3), CheckpointError, "is not what ailab writes"),
        (_good(model={"type": "os.system", "command": "touch canary"}), CheckpointError, "names the type 'os.system'"),
        (
            _good(reading={"field": "x", "image": True, "transform": [{"type": "os:abort"}]}),
            CheckpointError,
            "names the type 'os:abort'",
        ),
        (_good(model={"type": "MPL", "sizes": [1, 1]}), ConfigError, "Did you mean 'MLP'"),
        (_good(model={"type": "MLP", "size": [1, 1]}), ConfigError, "MLP takes no 'size'"),
        (_good(reading={"field": "input", "path": "/"}), ConfigError, "the preprocessing takes no 'path'"),
    ],
)
def test_a_model_json_is_checked_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, error: type[Exception], words: str
) -> None:
    """No recipe, another form, a dotted path, an unknown name or argument: an error of its kind, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        read_recipe(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_is_the_same_on_each_checkpoint(tmp_path: Path) -> None:
    """Two checkpoints of a run, and those of a second run of the same cfg, have the same bytes of model.json."""
    cfg = photo_cfg(tmp_path)
    cfg["total_epochs"] = 2
    saved(cfg)
    saved({**cfg, "work_dir": str(tmp_path / "again")})
    assert len({p.read_bytes() for p in tmp_path.glob("*/checkpoints/*/model.json")}) == 1
    assert len(list(tmp_path.glob("*/checkpoints/*/model.json"))) == 4
    assert torch.load(next(tmp_path.glob("run/checkpoints/*/state.pt")), weights_only=True)["step"] > 0
