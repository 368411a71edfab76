"""Evaluators: compute the true gradients at several points at once."""

from optex.evaluators.interface import Evaluation, Evaluator, GradientSource
from optex.evaluators.sequential import SequentialEvaluator
from optex.evaluators.vectorized import VectorizedEvaluator

__all__ = ["Evaluation", "Evaluator", "GradientSource", "SequentialEvaluator", "VectorizedEvaluator"]
