"""Losses: the classes of torch.nn by name, with per-sample weights."""

from ailab.losses.torch_losses import maskable

__all__ = ["maskable"]
