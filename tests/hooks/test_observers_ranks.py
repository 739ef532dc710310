"""Observers and early stops of several processes: one writes, all agree, and the results are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import built, digest
from test_early_stop import fed
from test_metric_hook import MAPPING, OWN_MAPPING, Count
from test_tensorboard import curve, events, picture_cfg

from ailab.stack import Middleware

VALUES = [3.0, 2.0, 2.5, 2.5, 1.0]


def observed(folder: str, sync: str) -> dict[str, Any]:
    """One run with every observer on this rank; what each epoch gave, and what is left at its end."""
    logs: list[dict[str, float]] = []

    def spy(*, name: str = "spy") -> Middleware[Any]:
        def wrap(epoch: Any) -> Any:
            def seen(state: Any, batches: Any) -> Any:
                state, found = epoch(state, batches)
                logs.append(found.values_as_floats())
                return state, found

            return seen

        return Middleware(name, wrap, "epoch")

    cfg = picture_cfg(Path(folder), histograms=1, images=2) | {"total_epochs": 9, "dist": dict(sync=sync)}
    given = cfg["hooks"]
    metrics: dict[str, Any] = {
        **given.pop("metrics"),
        "count": dict(type=Count, mapping=OWN_MAPPING),
        "f1": dict(type="torchmetrics.classification.MulticlassF1Score", num_classes=3, mapping=MAPPING),
    }
    cfg["hooks"] = dict(
        metrics=metrics,
        fed=dict(type=fed, values=VALUES),
        stop=dict(type="EarlyStopHook", patience=2),
        checkpoint=dict(type="CheckpointHook", interval=5),
        speed=dict(type="ThroughputHook", interval=2, peak_flops=1e9),
        profiler=dict(type="ProfilerHook", wait=1, warmup=1, active=1),
        **given,
        spy=dict(type=spy),
    )
    job = built(cfg)
    state = job.run(job.state)
    return {"at": state.at, "bytes": digest(state), "logs": logs}


@pytest.mark.parametrize("sync", ["ddp", "graph"])
def test_two_ranks_observe_as_one_process(sync: str, ranks: Any, tmp_path: Path) -> None:
    """Results of class-style metrics are exact, both ranks stop after the same epoch with one state, and rank 0 alone writes."""
    pytest.importorskip("torchmetrics", reason="the oracle")
    pytest.importorskip("tensorboard", reason="an optional writer")
    [alone] = ranks(1)(observed, str(tmp_path / "one"), sync)
    a, b = ranks(2)(observed, str(tmp_path / "two"), sync)
    assert a["bytes"] == b["bytes"] and a["at"] == b["at"] == alone["at"] == 4 * 3
    for ours, theirs, one in zip(a["logs"], b["logs"], alone["logs"], strict=True):
        assert ours == theirs
        assert ours == pytest.approx(one, rel=1e-4)
        assert (ours["train_count_samples"], ours["val_count_samples"]) == (30.0, 9.0)
    for folder, world in (("one", 1), ("two", 2)):
        files = sorted(p.name for p in (tmp_path / folder / "profile").iterdir())
        assert files == [f"rank{r}_step00000003.json" for r in range(world)]
        assert [p.name for p in (tmp_path / folder / "checkpoints").iterdir()] == ["step_00000012"]
        [_] = (tmp_path / folder / "tensorboard").iterdir()
    one, two = (events(tmp_path / f / "tensorboard") for f in ("one", "two"))
    assert one.Tags() == two.Tags() and two.Tags()["images"] == ["samples/val"]
    assert [s for s, _ in curve(two, "epoch/val/count_share")] == [3, 6, 9, 12]
    norms = [[e.histogram_value.sum_squares for e in f.Histograms("grads/last.weight")] for f in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and len(norms[0]) == 4
