"""Samples to batches: order, workers, collation, transport, prefetch, and what becomes of a bad sample."""
