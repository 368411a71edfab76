"""Gradients in other processes or threads."""

from optex.evaluators.workers.evaluator import WorkersEvaluator

__all__ = ["WorkersEvaluator"]
