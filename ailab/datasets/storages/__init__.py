"""Storages: they give the raw record of an index. A dataset class inherits one storage and one task."""
