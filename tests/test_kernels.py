"""The suite on machines of other kinds: bits are a law for the same kernels on the same machine, and no further."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = [
    "core",
    "job",
    "optim",
    "losses",
    "metrics",
    "workdir",
    "hooks",
    "datasets",
    "test_compile.py",
    "test_fit.py",
    "test_data.py",
]
MACHINES = {
    "no vector instructions, 2 threads": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
    "AVX2, 1 thread": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
}


@pytest.mark.nightly
@pytest.mark.parametrize("machine", list(MACHINES))
def test_the_suite_passes_with_other_kernels(machine: str) -> None:
    """What the tests hold does not depend on the vector instructions of the CPU or on the number of threads."""
    parts = [str(ROOT / "tests" / part) for part in PARTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parts],
        cwd=ROOT,
        env={**os.environ, **MACHINES[machine]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
