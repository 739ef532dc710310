"""Hooks that measure: pure metrics at depth `loss` (traced), class-style ones at `host` and `epoch`."""
