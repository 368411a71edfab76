"""Slow, obvious twins that the fast code is held to."""
