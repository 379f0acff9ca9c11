"""What other implementations offer beside the model: attention beyond the chunk, the original's seven operations."""
