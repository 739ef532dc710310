"""Laws of the cfg file: it runs once, an override changes one value, and a snapshot has no secret."""

import json
import math
import pickle
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ailab.config.load import is_secret, load, override, snapshot
from ailab.config.schema import Cfg, Data
from ailab.errors import ConfigError


def example() -> dict:
    """A cfg with a dict, a list and a tuple to reach into."""
    return dict(
        seed=42,
        work_dir="./work_dir",
        workflow=[{"phase": "train", "iters": 100}, {"phase": "val", "amp": dict(enable=False)}],
        compile=dict(cut="step", donate=False),
        data=dict(train_dataloader=dict(batch_size=32)),
        model=dict(type="SeedModel"),
        optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.95), freeze=["head.*"]),
        hooks=dict(amp=dict(type="AMPHook", enable=False), checkpoint=dict(type="CheckpointHook")),
    )


def at(cfg, path):
    for key in path:
        cfg = cfg[key]
    return cfg


def differences(a, b, path=()):
    """Where two cfgs differ, not looking into values of another type or length."""
    if a == b:
        return []
    if isinstance(a, dict) and isinstance(b, dict) and path != ("hooks", "ema"):
        return [d for k in {**a, **b} for d in differences(a.get(k), b.get(k), (*path, k))]
    if isinstance(a, list) and isinstance(b, list):
        return [d for k, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, (*path, k))]
    return [path]


def written(folder: Path, text: str, name: str = "exp_one.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.fixture
def clean(monkeypatch):
    """What loading changes in the process is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


@pytest.mark.usefixtures("clean")
def test_a_cfg_file_runs_as_a_script_would(tmp_path):
    """Its folder comes first on the path, neighbours can be imported, and its classes pickle under the file's name."""
    written(tmp_path, "width = 7", "neighbour_of_exp.py")
    text = "import neighbour_of_exp\nclass Data: pass\ncfg = dict(seed=neighbour_of_exp.width, a=dict(type=Data))\n"
    cfg = load(written(tmp_path, text))
    assert cfg["seed"] == 7
    assert sys.path[0] == str(tmp_path.resolve())
    assert pickle.loads(pickle.dumps(cfg["a"]["type"])) is cfg["a"]["type"]
    assert cfg["a"]["type"].__module__ == "exp_one"


@pytest.mark.usefixtures("clean")
def test_a_cfg_file_never_takes_the_name_of_another_module(tmp_path):
    """A file called json.py is loaded under a prefixed name; a changed file is read anew."""
    cfg = load(written(tmp_path, "class D: pass\ncfg = dict(a=D)", "json.py"))
    assert cfg["a"].__module__ == "ailab_cfg_json"
    assert sys.modules["json"] is json
    assert [load(written(tmp_path, f"cfg = dict(a={i})"))["a"] for i in (1, 2)] == [1, 2]


@pytest.mark.usefixtures("clean")
def test_loading_never_changes_the_dict_of_the_file(tmp_path):
    """Overrides and later changes touch a copy of the containers; the objects in them are the same."""
    file = written(tmp_path, "shared = object()\ncfg = dict(a=dict(b=[1, shared]))")
    cfg = load(file, ["a.b.0=5"])
    original = sys.modules["exp_one"].cfg
    cfg["a"]["new"] = 1
    assert original["a"] == {"b": [1, sys.modules["exp_one"].shared]}
    assert cfg["a"]["b"][0] == 5
    assert cfg["a"]["b"][1] is sys.modules["exp_one"].shared


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = 1 / 0\ncfg = {}", r"exp_one\.py, line 2: ZeroDivisionError: division by zero$"),
        ("x = 1\n\ncfg = dict(\n", r"exp_one\.py, line 3: SyntaxError: '\(' was never closed$"),
        ("def f():\n    raise ValueError('no')\n\nf()", r"exp_one\.py, line 2: ValueError: no$"),
        ("import no_such_module_here", r"line 1: ModuleNotFoundError: No module named 'no_such_module_here'$"),
        ("import json\njson.loads('{')", r"line 2: JSONDecodeError: "),
        ("from ailab.errors import ConfigError\nraise ConfigError('two of them')", r"exp_one\.py, line 2: two of them$"),
        ("cgf = {}", r"exp_one\.py defines no `cfg`"),
        ("cfg = [1]", r"`cfg` has to be a dict, got list\.$"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, text, said):
    """A file that raises, or defines no dict `cfg`, is one clear message with the line, and leaves no module behind."""
    with pytest.raises(ConfigError, match=said):
        load(written(tmp_path, text))


def test_a_missing_file_is_one_message(tmp_path):
    """A file that does not exist is named, with the nearest that does."""
    written(tmp_path, "cfg = {}", "exp.py")
    with pytest.raises(ConfigError, match=r"there is no cfg file '.*exq\.py'\. Did you mean 'exp\.py'\?"):
        load(tmp_path / "exq.py")


def test_classes_of_a_cfg_reach_spawned_processes(tmp_path):
    """An object of a class that the cfg file defines unpickles in a spawned process."""
    written(tmp_path, "class Data:\n    def read(self): return 41 + 1\ncfg = dict(a=Data())")
    main = "import multiprocessing as mp\nfrom ailab.config.load import load\nif __name__ == '__main__':\n"
    main += f"    cfg = load({str(tmp_path / 'exp_one.py')!r})\n"
    main += "    with mp.get_context('spawn').Pool(1) as pool: print(pool.apply(cfg['a'].read))\n"
    other = tmp_path / "elsewhere"
    other.mkdir()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(written(other, main, "main.py"))],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": root, "PATH": ""},
    )
    assert done.stdout.strip() == "42", done.stderr


# ---- overrides


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("optimizer.lr=3e-4", ("optimizer", "lr"), 3e-4),
        ("optimizer.betas=(0.9, 0.99)", ("optimizer", "betas"), (0.9, 0.99)),
        ("optimizer.betas.1=0.999", ("optimizer", "betas"), (0.9, 0.999)),
        ("optimizer.freeze.0=stem.*", ("optimizer", "freeze", 0), "stem.*"),
        ("workflow.0.iters=5", ("workflow", 0, "iters"), 5),
        ("hooks.amp.enable=true", ("hooks", "amp", "enable"), True),
        ("workflow.1.amp.enable=true", ("workflow", 1, "amp", "enable"), True),
        ("compile.donate=none", ("compile", "donate"), None),
        ("work_dir=./runs/a=b", ("work_dir",), "./runs/a=b"),
        ("model.type=MyModel", ("model", "type"), "MyModel"),
        ("work_dir=", ("work_dir",), ""),
        ("hooks.ema={'type': 'EMAHook'}", ("hooks", "ema"), {"type": "EMAHook"}),
        ("data.train_dataloader.shuffle=False", ("data", "train_dataloader", "shuffle"), False),
    ],
)
def test_an_override_sets_one_value(item, path, value):
    """`a.b.c=value` changes that value alone, in a copy; values are literals, else strings."""
    cfg = example()
    changed = override(cfg, [item])
    assert at(changed, path) == value
    assert type(at(changed, path)) is type(value)
    assert cfg == example()
    assert override(changed, []) == changed
    assert differences(cfg, changed) == [path]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("optimizer.lr", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("optimzer.lr=3", "cfg has no 'optimzer'. Did you mean 'optimizer'?"),
        ("model.backbone.depth=3", "cfg.model has no 'backbone'."),
        ("hooks.ema=True", "cfg.hooks has no 'ema'."),
        ("hooks.ema.enable=True", "cfg.hooks has no 'ema'."),
        ("workflow.7.iters=5", "cfg.workflow is a list of 2; '7' is no index of it."),
        ("workflow.x.iters=5", "'x' is no index"),
        ("seed.x=5", "cfg.seed is int 42; it has no 'x' to set."),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(item, said):
    """Only the last key may be new; what is malformed or leads nowhere is an error."""
    with pytest.raises(ConfigError, match=re.escape(said)):
        override(example(), [item])


def test_an_override_makes_the_section_that_it_belongs_to() -> None:
    """Every section that a cfg may leave out, and none that is not one."""
    may_lack = {f.name for f in fields(Cfg) if f.default is not MISSING or f.default_factory is not MISSING}
    assert {"dist", "compile", "hooks"} <= may_lack
    loaders = [f"data.{f.name}" for f in fields(Data) if f.name.endswith("_dataloader")]
    made = {"dist": "sync", "compile": "cut", **dict.fromkeys(loaders, "batch_size")}
    for section, key in made.items():
        path = [*section.split("."), key]
        assert at(override({"data": {}}, [f"{section}.{key}=3"]), path) == 3
    assert override({}, ["hooks.ema={'type': 'EMAHook'}"]) == {"hooks": {"ema": {"type": "EMAHook"}}}
    with pytest.raises(ConfigError, match=re.escape("cfg has no 'dits'. Did you mean 'dist'?")):
        override({"dist": {}}, ["dits.sync=graph"])


# ---- the snapshot


@pytest.mark.parametrize(
    "key",
    [
        *("key", "api_key", "apikey", "wandb_api_key", "apiKey", "API_KEY", "access-key", "secret", "secret_key", "AWS_SECRET"),
        *(
            "token",
            "hf_token",
            "auth_token",
            "accessToken",
            "password",
            "db_passwd",
            "pwd",
            "credentials",
            "aws_cred",
            "cookie",
        ),
        *("session_cookies", "authorization", "api_keys", "api_key_2"),
    ],
)
def test_secret_keys_are_redacted(key):
    """The value under a key that names a secret is never written."""
    assert is_secret(key)
    assert snapshot({key: "hunter2"}) == {key: "***"}
    assert snapshot({key: {"inner": "hunter2"}}) == {key: "***"}


@pytest.mark.parametrize(
    "key",
    [
        *("keep", "output_keys", "monitor_key", "keys", "key_dim", "keypoints", "num_tokens", "max_tokens", "tokenizer"),
        *("pad_token", "token_dim", "author", "authors", "credit", "monkey", "sort_key", "pass_through", "passes", "num_keys"),
        *("cls_token", "token_ids", "qkv_keys", "cookiecutter"),
    ],
)
def test_innocent_keys_are_kept(key):
    """A key that only looks like a secret keeps its value."""
    assert snapshot({key: "a value"}) == {key: "a value"}


def test_no_secret_survives_in_urls():
    """User, password and secret query parameters of a URL are taken out; the rest stays."""
    assert snapshot("https://me:pw@host:80/path") == "https://host:80/path"
    assert snapshot("s3://k:p@bucket/x?region=eu&token=abc&n=1") == "s3://bucket/x?region=eu&token=***&n=1"
    assert snapshot("env://") == "env://"
    assert snapshot("https://host/@scope/x") == "https://host/@scope/x"


def test_objects_have_readable_stand_ins():
    """Classes and functions by qualified name, small tensors as lists, large ones by shape and dtype, non-finite as strings."""
    assert snapshot({"type": nn.Linear, 1: nn.ReLU(), "f": example, "d": torch.float16, "p": Path("a/b")}) == {
        "type": "torch.nn.modules.linear.Linear",
        "1": "torch.nn.modules.activation.ReLU",
        "f": f"{__name__}.example",
        "d": "torch.float16",
        "p": "a/b",
    }
    assert snapshot([torch.ones(100, 100), torch.tensor([1.5, math.inf]), np.arange(2), math.inf, math.nan, (1, {2})]) == [
        "Tensor(shape=(100, 100), dtype=torch.float32)",
        [1.5, "inf"],
        [0, 1],
        "inf",
        "nan",
        [1, [2]],
    ]


_leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3) | st.builds(object)
)
_trees = st.recursive(
    _leaves,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3) | st.tuples(t),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(_trees)
def test_a_snapshot_is_json_and_stable(value):
    """Whatever a cfg holds, its snapshot is strict JSON, and a snapshot of it is itself."""
    once = snapshot(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    assert snapshot(once) == once
