"""Hooks at depth `loss`: they change the forward (traced)."""
