"""Evaluators: compute the true gradients at several points at once."""

from optex.evaluators.interface import Draws, Evaluation, Evaluator, GradientSource
from optex.evaluators.sequential import SequentialEvaluator
from optex.evaluators.vectorized import VectorizedEvaluator

__all__ = ["Draws", "Evaluation", "Evaluator", "GradientSource", "SequentialEvaluator", "VectorizedEvaluator"]
