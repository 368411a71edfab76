"""optex: first-order optimizers with fewer gradients, and several at once.

Shu, Fang, He, Yu: *OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations*,
NeurIPS 2024, arXiv 2402.11427, and what goes past it.
"""

from importlib.metadata import version

from optex.advice import Advice, advise
from optex.errors import (
    ConvergenceWarning,
    JitterWarning,
    NonFiniteError,
    NonFiniteWarning,
    NotDeterministicWarning,
    NotPositiveDefiniteError,
    PlainStepWarning,
    RankLostError,
    WorkerLostError,
)
from optex.estimators import (
    CommitteeEstimator,
    CurlFreeEstimator,
    Estimator,
    GradientHistory,
    HoldLast,
    Posterior,
    SeparableEstimator,
)
from optex.estimators.kernels import RBF, Kernel, Matern12, Matern32, Matern52, RationalQuadratic
from optex.evaluators import (
    DistributedEvaluator,
    Evaluation,
    EvaluationRequest,
    Evaluator,
    SequentialEvaluator,
    VectorizedEvaluator,
    WorkersEvaluator,
)
from optex.minimize import maid, minimize, scipy_method
from optex.optimizer import OptEx
from optex.round import Acceptance, Last, LowestLoss, RoundReport, SmallestGradient, WithinTolerance
from optex.sources import (
    AccumulatingSource,
    GradientSource,
    InexactBilevelSource,
    LowerLevelError,
    ObjectiveSource,
    SmoothBilevel,
)

__version__ = version("optex")
__all__ = [
    "RBF",
    "Acceptance",
    "AccumulatingSource",
    "Advice",
    "CommitteeEstimator",
    "ConvergenceWarning",
    "CurlFreeEstimator",
    "DistributedEvaluator",
    "Estimator",
    "Evaluation",
    "EvaluationRequest",
    "Evaluator",
    "GradientHistory",
    "GradientSource",
    "HoldLast",
    "InexactBilevelSource",
    "JitterWarning",
    "Kernel",
    "Last",
    "LowerLevelError",
    "LowestLoss",
    "Matern12",
    "Matern32",
    "Matern52",
    "NonFiniteError",
    "NonFiniteWarning",
    "NotDeterministicWarning",
    "NotPositiveDefiniteError",
    "ObjectiveSource",
    "OptEx",
    "PlainStepWarning",
    "Posterior",
    "RankLostError",
    "RationalQuadratic",
    "RoundReport",
    "SeparableEstimator",
    "SequentialEvaluator",
    "SmallestGradient",
    "SmoothBilevel",
    "VectorizedEvaluator",
    "WithinTolerance",
    "WorkerLostError",
    "WorkersEvaluator",
    "advise",
    "maid",
    "minimize",
    "scipy_method",
]
