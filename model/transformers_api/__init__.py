"""What transformers asks of a model: its config, cache, generation, padding and placement."""
