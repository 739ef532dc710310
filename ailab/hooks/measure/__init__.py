"""Metrics as hooks. They are traced into the step, or updated on the host."""
