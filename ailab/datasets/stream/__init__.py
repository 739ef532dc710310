"""Batches from samples: order, samplers, workers, collation, transport, prefetch, and the handling of bad samples."""
