"""Everything that a run writes, and how it is read again."""
