"""Hooks around a whole run: checkpoints, resuming, early stopping."""
