"""Hooks at depth `grad`: they change the gradient, or compute it more than once (traced)."""
