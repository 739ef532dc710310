"""Hooks at depth `step`: they map state to state (traced)."""
