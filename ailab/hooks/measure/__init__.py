"""Metrics as hooks: traced into the step, or updated on the host."""
