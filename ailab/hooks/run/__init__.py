"""Hooks at depths `run` and `epoch` that save, resume and end a run."""
