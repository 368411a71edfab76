"""The family's batch sizes: rules that set how many samples a gradient gets."""
