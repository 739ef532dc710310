"""Losses: torch's own by name, made maskable."""

from ailab.losses.torch_losses import maskable

__all__ = ["maskable"]
