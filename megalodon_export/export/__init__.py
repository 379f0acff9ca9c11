"""The export commands: a checkpoint in, a verified bundle out."""
