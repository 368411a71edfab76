"""Sources: what a gradient is."""
