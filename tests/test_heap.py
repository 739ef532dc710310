"""Freed memory stays with the process, unless its user chose otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PEAK = """
import resource, torch
from ailab.heap import keep_freed
keep_freed(1 << 30)
def step():  # what a step does: takes many pieces of all sizes, and gives them all back
    return [torch.ones(n << 18) for n in (1, 2, 3, 5, 7) for _ in range(4)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone gives memory back and can be told not to")
def test_freed_memory_is_not_faulted_in_again() -> None:
    """Ten steps that free all they took cause next to no page faults; the thousands of before where a user chose so."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}

    def faults(**more: str) -> int:
        done = subprocess.run([sys.executable, "-c", PEAK], env=env | more, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults() < 200
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 5_000
