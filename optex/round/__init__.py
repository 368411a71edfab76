"""A round, told in its order: draft, evaluate, remember, replay, keep."""
