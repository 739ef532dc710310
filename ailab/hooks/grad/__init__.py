"""Hooks at depth `grad`: they map gradients, or call the gradient again (traced)."""
