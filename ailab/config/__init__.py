"""The cfg file, its keys and defaults, and all its mistakes at once."""
