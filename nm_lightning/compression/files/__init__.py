"""A compressed network on disk: checkpoints and files that run elsewhere."""
