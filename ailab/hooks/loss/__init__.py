"""Hooks at depth `loss`: they change the forward pass (traced)."""
