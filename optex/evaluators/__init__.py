"""Evaluators: compute the true gradients at several points at once."""

from optex.evaluators.interface import AccumulatingSource, Draws, Evaluation, Evaluator, GradientSource
from optex.evaluators.ranks import DistributedEvaluator
from optex.evaluators.sequential import SequentialEvaluator
from optex.evaluators.vectorized import VectorizedEvaluator
from optex.evaluators.workers import WorkersEvaluator

__all__ = [
    "AccumulatingSource",
    "DistributedEvaluator",
    "Draws",
    "Evaluation",
    "Evaluator",
    "GradientSource",
    "SequentialEvaluator",
    "VectorizedEvaluator",
    "WorkersEvaluator",
]
