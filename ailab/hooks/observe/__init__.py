"""Hooks at depths `host` and `epoch` that look and write, and change nothing."""
