"""Several processes that work on one run: ranks, split vectors, checkpoints."""
