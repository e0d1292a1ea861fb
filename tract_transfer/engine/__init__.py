"""The one loop, what watches it, and its checkpoints."""
