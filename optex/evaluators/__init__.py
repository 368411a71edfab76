"""Evaluators: how the true gradients at several points are computed at once."""

from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, WrappingEvaluator
from optex.evaluators.randomness import RandomDraws
from optex.evaluators.ranks import DistributedEvaluator
from optex.evaluators.sequential import SequentialEvaluator
from optex.evaluators.vectorized import VectorizedEvaluator
from optex.evaluators.workers import WorkersEvaluator

__all__ = [
    "DistributedEvaluator",
    "Evaluation",
    "EvaluationRequest",
    "Evaluator",
    "RandomDraws",
    "SequentialEvaluator",
    "VectorizedEvaluator",
    "WorkersEvaluator",
    "WrappingEvaluator",
]
