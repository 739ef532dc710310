"""The bare callable at each depth, before any hook wraps it."""
