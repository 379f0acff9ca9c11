"""Checkpoints of other implementations, converted to folders that transformers loads."""
