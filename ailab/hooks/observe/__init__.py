"""Hooks at depths `host` and `epoch` that log and write files. They change no state."""
