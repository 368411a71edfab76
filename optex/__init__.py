"""optex: several steps of a first-order optimizer in the time of one.

Shu, Fang, He, Yu: *OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations*,
NeurIPS 2024, arXiv 2402.11427, and what goes past it.
"""

from importlib.metadata import version

from optex.errors import (
    ConvergenceWarning,
    JitterWarning,
    NonFiniteError,
    NonFiniteWarning,
    NotPositiveDefiniteError,
    RankLostError,
    WorkerLostError,
)
from optex.estimators import (
    CommitteeEstimator,
    CurlFreeEstimator,
    Estimator,
    HoldLast,
    Posterior,
    SeparableEstimator,
)
from optex.estimators.history import GradientHistory
from optex.estimators.kernels import RBF, Kernel, Matern12, Matern32, Matern52, RationalQuadratic
from optex.evaluators import (
    AccumulatingSource,
    DistributedEvaluator,
    Evaluator,
    SequentialEvaluator,
    VectorizedEvaluator,
    WorkersEvaluator,
)
from optex.minimize import minimize, scipy_method
from optex.optimizer import OptEx
from optex.round.acceptance import Acceptance, Last, LowestLoss, SmallestGradient, WithinTolerance
from optex.round.report import RoundReport

__version__ = version("optex")
__all__ = [
    "RBF",
    "Acceptance",
    "AccumulatingSource",
    "CommitteeEstimator",
    "ConvergenceWarning",
    "CurlFreeEstimator",
    "DistributedEvaluator",
    "Estimator",
    "Evaluator",
    "GradientHistory",
    "HoldLast",
    "JitterWarning",
    "Kernel",
    "Last",
    "LowestLoss",
    "Matern12",
    "Matern32",
    "Matern52",
    "NonFiniteError",
    "NonFiniteWarning",
    "NotPositiveDefiniteError",
    "OptEx",
    "Posterior",
    "RankLostError",
    "RationalQuadratic",
    "RoundReport",
    "SeparableEstimator",
    "SequentialEvaluator",
    "SmallestGradient",
    "VectorizedEvaluator",
    "WithinTolerance",
    "WorkerLostError",
    "WorkersEvaluator",
    "minimize",
    "scipy_method",
]
