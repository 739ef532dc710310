"""Storages: where raw records come from. Inherit one beside a task."""
