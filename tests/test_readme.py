"""The README's code runs as written, and the commands, files, flags and names in its text exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from files import picture, pixels
from torch import Tensor, nn
from torch.distributed.run import get_args_parser

import ailab.datasets
from ailab import Mean, help
from ailab.config import check
from ailab.config.load import load as load_cfg
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.job.weights import init_model
from ailab.registry import DATASETS, HOOKS, LOSSES
from ailab.rng import mix, seed_device
from ailab.testing import check_hook

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DISK, PHOTOS, OWN_MODULE, CONTRAST, OWN_HOOKS, FIT, PIECES = BLOCKS
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
COMMANDS += re.findall(r"`((?:python|torchrun) -m [^`]+)`", TEXT)
SMALL = ["total_epochs=1", "data.train_dataloader.num_workers=0"]  # 8 pictures need no workers, and need not be large
SMALL += [f"data.{phase}.transform.0.size=[48, 48]" for phase in ("train", "val")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's two cfg files, and pictures for the second: 8 to train, 4 to validate, 2 classes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "disk.py").write_text(DISK)
    (folder / "photos.py").write_text(PHOTOS)
    for phase, count in (("train", 4), ("val", 2)):
        for label, kind in enumerate(("cat", "dog")):
            for i in range(count):
                picture(folder / "photos" / phase / kind / f"{i}.png", (pixels(i, 48, 64) // 2 + 128 * label).to(torch.uint8))
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def names_of(block: str, place: Path, name: str) -> dict[str, Any]:
    """What a block defines; it is run from a file, so that its components can be registered again."""
    file = place / f"{name}.py"
    file.write_text(block)
    names: dict[str, Any] = {}
    exec(compile(block, str(file), "exec"), names)
    return names


@pytest.fixture(scope="module")
def photos(place: Path) -> tuple[Path, str]:
    """The work_dir and the console of a run of `photos.py`, one epoch long."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("tqdm.tqdm.write", lambda line, **_: said.append(line))
        fit(load_cfg("photos.py", SMALL))
    return place / "work_dir" / "photos", "\n".join(said)


# ---- the cfgs


def test_the_cfg_trains() -> None:
    """The README's first cfg runs, and its net tells the disk from what is around it."""
    result = fit(load_cfg("disk.py"))
    assert result.metrics["val_top1"] > 0.97
    assert result.state.at == 5 * 40
    assert result.work_dir.resolve() == Path("work_dir/disk").resolve()


def test_another_lr_is_refused_in_the_words_of_the_readme(place: Path) -> None:
    """`key: old -> new` and the two ways out; `total_epochs` is free; `changed="accept"` continues."""
    short = ["work_dir=work_dir/begun", "total_epochs=1"]
    fit(load_cfg("disk.py", short))
    assert fit(load_cfg("disk.py", [short[0], "total_epochs=2"])).state.at == 80
    other = [short[0], "total_epochs=3", "optimizer.lr=3e-3"]
    with pytest.raises(ConfigError) as caught:
        fit(load_cfg("disk.py", other))
    assert "  cfg.optimizer.lr: 0.01 -> 0.003" in str(caught.value).splitlines()
    assert "another work_dir" in str(caught.value) and "changed='accept'" in str(caught.value)
    assert fit(load_cfg("disk.py", [*other, "hooks.resume.changed=accept"])).state.at == 120


def test_fine_tuning_begins_with_the_model_of_another_run(place: Path) -> None:
    """`resume_from` in a work_dir of its own: the first parameters are those of the checkpoint, and the lr may be another."""
    fit(load_cfg("disk.py", ["work_dir=work_dir/first", "total_epochs=1"]))
    more = [
        "work_dir=work_dir/second",
        "total_epochs=2",
        "optimizer.lr=1e-3",
        "hooks.resume.resume_from=work_dir/first/checkpoints",
    ]
    assert fit(load_cfg("disk.py", more)).state.at == 80


def test_the_transforms_and_the_class_weights_of_the_pictures(place: Path) -> None:
    """Samples are (3, 224, 224) float32 around 0, of the classes of the folders; the loss has a weight for each class."""
    cfg = load_cfg("photos.py")
    for phase in ("train", "val"):
        dataset = DATASETS.build(cfg["data"][phase], f"cfg.data.{phase}")
        sample = dataset[0]
        assert dataset.classes == ["cat", "dog"] and int(sample["target"]) == 0
        assert sample["input"].shape == (3, 224, 224) and sample["input"].dtype == torch.float32
        assert float(sample["input"].min()) >= -2 and float(sample["input"].max()) <= 2
    torch.testing.assert_close(LOSSES.build(cfg["loss"], "cfg.loss").weight, torch.tensor([1.0, 2.5]))


def test_the_best_checkpoint_of_the_pictures_is_named(photos: tuple[Path, str]) -> None:
    """Without a `mode`; by `best.json` and by the last lines of the console. `train.log` has the console's lines."""
    work_dir, said = photos
    best = json.loads((work_dir / "checkpoints" / "best.json").read_text())
    assert best["path"] == "step_00000001" and best["metric"] == "val_top1" and best["mode"] == "max"
    assert re.search(r"best checkpoint +work_dir/photos/checkpoints/step_00000001", said)
    assert {"metrics.jsonl", "config.json", "train.log"} <= {p.name for p in work_dir.iterdir()}
    row = json.loads((work_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "epoch", "phase", "lr", "loss", "top1"} <= set(row)


def test_the_console_is_in_the_log(photos: tuple[Path, str]) -> None:
    """`train.log` has what the console showed, the opening lines too."""
    work_dir, said = photos
    log = (work_dir / "train.log").read_text()
    assert "ResNet" in said and all(line in log for line in said.splitlines() if line.startswith(("model", "epoch")))


def test_the_parameters_go_into_ones_own_module(photos: tuple[Path, str], place: Path) -> None:
    """The README's lines load the checkpoint that `best.json` names, tensor by tensor."""
    step = json.loads((photos[0] / "checkpoints" / "best.json").read_text())["path"]
    names = names_of(OWN_MODULE.replace("step_00001240", step), place, "own_module")
    assert names["model"].fc.out_features == 2
    assert all(torch.equal(t, names["saved"]["model_state"][n]) for n, t in names["model"].state_dict().items())


def test_a_model_begins_with_the_weights_of_a_file(place: Path) -> None:
    """The README's entry brings the names of another file to torchvision's, and leaves the head alone."""
    import torchvision

    torch.manual_seed(9)
    source = {n: t + 1 for n, t in torchvision.models.resnet18().state_dict().items()}
    old = {
        n.replace("conv1.", "stem.") if n.startswith("conv1.") else n.replace("downsample", "short"): t
        for n, t in source.items()
    }
    torch.save({f"net.{n}": t for n, t in old.items()}, "r18.pth")
    model = torchvision.models.resnet18(num_classes=2)
    head = model.fc.weight.clone()
    [entry] = re.findall(r"`(init=dict\(.*?\))`", TEXT)
    cfg = load_cfg("photos.py")
    cfg["model"].update(names_of(entry, place, "init"))
    check.check(cfg)
    init_model(model, check.complete(cfg)["model"]["init"])
    assert torch.equal(model.fc.weight, head)
    assert all(torch.equal(t, source[n]) for n, t in model.state_dict().items() if not n.startswith("fc."))


# ---- binding: losses and metrics


def disk_with(work_dir: str, **changes: Any) -> dict[str, Any]:
    return {**load_cfg("disk.py"), "total_epochs": 1, "work_dir": f"work_dir/{work_dir}", "hooks": {}, **changes}


def small_logits(output: Tensor, target: Tensor, factor: float) -> dict[str, Any]:
    a = nn.functional.cross_entropy(output, target, reduction="none")
    return {"entropy": a, "size": (factor, output.square().mean(1))}


def error_rate(output: Tensor, target: Tensor) -> Mean:
    return Mean.of((output.argmax(1) != target).float())


error_rate.higher_is_better = False  # type: ignore[attr-defined]


def test_several_losses_and_a_metric_are_functions(place: Path) -> None:
    """The loss is entropy + factor * size, the parts are logged raw and weighted, and the lowest error is the best."""
    metrics = dict(type="MetricHook", error=dict(type=error_rate))
    keep = dict(type="CheckpointHook", keep=dict(best=1, metric="val_error"))
    loss = dict(type=small_logits, factor=0.01)
    result = fit(disk_with("parts", loss=loss, hooks=dict(metrics=metrics, checkpoint=keep)))
    found = result.metrics
    assert found["val_loss"] == pytest.approx(found["val_entropy"] + 0.01 * found["val_size"], abs=1e-6)
    assert found["val_size_weighted"] == pytest.approx(0.01 * found["val_size"], rel=1e-6)
    assert 0 < found["val_error"] < 0.3
    assert json.loads((result.work_dir / "checkpoints" / "best.json").read_text())["mode"] == "min"


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 8), nn.Linear(2, 8)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(input), self.b(input)


def test_a_contrastive_loss_over_named_outputs(place: Path) -> None:
    """`output_keys` name the parts of a tuple; the loss is InfoNCE in plain torch, and training lowers it."""
    info_nce = names_of(CONTRAST, place, "contrast")["info_nce"]
    a, b = torch.randn(6, 8), torch.randn(6, 8)
    right = -(a @ b.T).log_softmax(1).diagonal()
    torch.testing.assert_close(info_nce(a, b), right)
    cfg = disk_with("contrast", model=dict(type=Towers, output_keys=["a", "b"]), loss=dict(type=info_nce))
    assert fit(cfg).metrics["train_loss"] < 3.7  # 3.91 = log(50) by chance


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.layer(input)
        return {"output": output, "loss": nn.functional.cross_entropy(output, target, reduction="none")}


def test_a_model_may_give_its_own_loss(place: Path) -> None:
    """Without `loss` in the cfg: what the model calls "loss", with a `forward` that takes the target."""
    found = fit(disk_with("own_loss", model=dict(type=WithLoss), loss=None)).metrics
    assert 0 < found["val_loss"] < 0.8


# ---- hooks


def test_the_hooks_run_at_their_depths(place: Path) -> None:
    """The README's three hooks work in a cfg: noise in the gradient, a bound on the weights, a file from the host."""
    names_of(OWN_HOOKS, place, "own_hooks")
    noise, clamp = dict(type="GradNoiseHook", std=0.01), dict(type="WeightClampHook", limit=0.05)
    result = fit(disk_with("hooks", hooks=dict(noise=noise, clamp=clamp, beat=dict(type="HeartbeatHook", every=10))))
    assert all((p.abs() <= 0.05).all() for p in result.state.params.values())
    assert (result.work_dir / "heartbeat").exists()


def test_the_hooks_keep_the_laws(place: Path) -> None:
    """`check_hook` accepts the README's traced hooks."""
    names = names_of(OWN_HOOKS, place, "own_hooks")
    check_hook(names["GradNoiseHook"](0.01), compiled=False)
    check_hook(names["WeightClampHook"](0.05), compiled=False)


def test_the_picture_has_every_hook() -> None:
    """All hooks of ailab, and no others, stand under the depths of the picture."""
    shown = re.search(r"```text\ndepth(.*?)```", TEXT, re.DOTALL)
    assert shown is not None
    assert {*re.findall(r"\w+Hook\b", shown[1])} == {*HOOKS.own()}


# ---- in Python


def test_a_cfg_runs_from_python(place: Path) -> None:
    """`load` takes changes as the command line does, and the result has metrics, state and work_dir."""
    result = names_of(FIT, place, "from_python")["result"]
    assert result.state.params["0.weight"].shape == (16, 2) and result.state.at == 200
    assert str(result.work_dir) == "work_dir/small" and result.metrics["val_top1"] > 0.9


def test_the_pieces_train_two_states(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's GAN: two states of 300 steps each, finite losses, the average of one and the gradient norm of the other."""
    names = names_of(PIECES, place, "gan")
    assert names["g_state"].at == names["c_state"].at == 300
    assert list(names["g_state"].slots) == ["ema"] and list(names["c_logs"]) == ["loss", "grad_norm"]
    printed = capsys.readouterr().out.split()
    assert printed[0] == "300" and all(0 < float(n) < 5 for n in printed[1:]) and len(printed) == 4


def test_two_optimizers_are_those_of_torch(place: Path) -> None:
    """20 steps of the README's GAN give the parameters of two optimizers of torch.optim in a plain loop, 1e-5."""
    torch.manual_seed(3)
    names = names_of(PIECES.replace("range(300)", "range(20)"), place, "gan")
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
    g_adam, c_adam = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (generator, critic))
    for step in range(20):
        noise, real = torch.randn(128, 8), nn.functional.normalize(torch.randn(128, 2))
        points = torch.cat([real, generator(noise).detach()])
        c_adam.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(critic(points), names["target"]).backward()
        nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
        c_adam.step()
        g_adam.zero_grad()
        nn.functional.softplus(-critic(generator(noise))).mean().backward()
        g_adam.step()
        seed_device(torch.device("cpu"), mix(0, step))  # as a step does
    for state, model in ((names["g_state"], generator), (names["c_state"], critic)):
        for n, p in model.named_parameters():
            torch.testing.assert_close(state.params[n], p.detach(), atol=1e-5, rtol=0)


def test_the_dataset_of_the_docstring_reads_a_folder(tmp_path: Path) -> None:
    """The example in the docstring of `ailab.datasets` gives each picture of a folder per class, bit for bit, with its class."""
    lines = str(ailab.datasets.__doc__).splitlines()
    block = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ") or not line)
    names = names_of(block, tmp_path, "leaves")
    wanted = [(picture(tmp_path / "leaves" / kind / "0.png"), i) for i, kind in enumerate(("ash", "oak"))]
    leaves = names["Leaves"](tmp_path / "leaves")
    assert len(leaves) == 2
    for i, (image, label) in enumerate(wanted):
        assert torch.equal(leaves[i]["input"], image)
        assert int(leaves[i]["target"]) == label


# ---- commands and names


def parsed(command: str) -> tuple[str, list[str]] | None:
    """(module of ailab, its arguments) of a command; None for pip and pytest."""
    words = shlex.split(command, comments=True)
    words = words[words.index("&&") + 1 :] if "&&" in words else words
    words = words[words.index("python") :] if words and words[0] == "srun" else words
    if words and words[0] == "torchrun":
        found = get_args_parser().parse_args(words[1:])  # it exits where an option does not exist
        assert found.module
        return found.training_script, found.training_script_args
    return (words[2], words[3:]) if words[:2] == ["python", "-m"] else None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its module, its cfg, its changes and its flags exist: it ends with 0; training is only shown."""
    found = parsed(command)
    if found is None:
        assert not command or command.startswith("pip install -e ")
        return
    module, arguments = found
    if module == "ailab.fit" and "--dry-run" not in arguments:
        arguments = [*arguments, "--show"] if "--show" not in arguments else arguments
    arguments = [str(ROOT / a) if a.startswith("cfgs/") else a for a in arguments]
    arguments += SMALL if "photos.py" in arguments else []
    assert importlib.import_module(module).main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_an_evaluation_needs_no_training(photos: tuple[Path, str]) -> None:
    """A workflow without "train" measures the newest checkpoint, and no step is made."""
    again = fit(load_cfg("photos.py", [*SMALL, 'workflow=[{"phase": "val"}]']))
    rows = [json.loads(line) for line in (photos[0] / "metrics.jsonl").read_text().splitlines()]
    trained = next(r for r in rows if r["phase"] == "val")
    assert again.state.at == 1
    assert again.metrics["val_top1"] == trained["top1"] and again.metrics["val_loss"] == pytest.approx(
        trained["loss"], rel=1e-5
    )


def test_the_names_and_flags_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Each type has a page of help, each `ailab.x` in the text can be imported, and --show is a flag of `ailab.fit`."""
    own = ("GradNoiseHook", "WeightClampHook", "HeartbeatHook", "Disk", "Net")
    types = {n for n in re.findall(r'\btype="(\w+)"', TEXT) if n not in own}
    types |= {n for n in re.findall(r"`(\w+Hook)\b", TEXT) if n not in own}
    assert all(help.page(n) for n in types)
    assert help.page("cfg.data") and help.page()
    coming = ("ailab.evaluate", "ailab.predict", "ailab.export")
    for path in {*re.findall(r"\bailab(?:\.\w+)+", TEXT)} - {*coming}:
        module, _, name = path.rpartition(".")
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), name), path
    with pytest.raises(SystemExit):
        importlib.import_module("ailab.fit").main(["--help"])
    assert "--show" in capsys.readouterr().out


def test_every_block_parses_and_every_file_exists() -> None:
    """Python blocks are Python, and the files that the text names are there."""
    assert all(ast.parse(block) for block in BLOCKS)
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:ailab|cfgs|benchmarks)/[\w/.]*)`", TEXT))


def test_the_readme_is_short() -> None:
    """At most 330 lines of at most 132 characters."""
    lines = TEXT.splitlines()
    assert len(lines) <= 330 and max(map(len, lines)) <= 132
