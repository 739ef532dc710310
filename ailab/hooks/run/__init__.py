"""Hooks around a whole run: checkpoints, resumption, early stopping."""
