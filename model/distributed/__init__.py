"""Sequence parallelism: one sequence in pieces over processes."""
