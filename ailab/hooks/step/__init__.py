"""Hooks at depth `step`: they change the new state of a step (traced)."""
