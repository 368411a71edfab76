"""optex: first-order optimizers with fewer gradients, and several at once.

Shu, Fang, He, Yu: *OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations*,
NeurIPS 2024, arXiv 2402.11427, and what goes past it.
"""

from importlib.metadata import version

from optex.advice import Advice, advise
from optex.errors import (
    ConvergenceWarning,
    JitterWarning,
    LowerLevelWarning,
    NonFiniteError,
    NonFiniteWarning,
    NotDeterministicWarning,
    NotPositiveDefiniteError,
    PlainStepWarning,
    RankDeficientError,
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
from optex.minimize import cbo_minimize, maid, minimize, minimize_gns, scipy_method, solve_bilevel
from optex.optimizer import OptEx
from optex.regularisers import regularise
from optex.round import Acceptance, Last, LowestLoss, RoundReport, SmallestGradient, WithinTolerance
from optex.sources import (
    AccumulatingSource,
    ConsensusSource,
    GradientSource,
    InexactBilevelSource,
    LowerLevelError,
    ObjectiveSource,
    PenaltyHypergradient,
    PerSampleSource,
    SmoothBilevel,
    SPSASource,
)

__version__ = version("optex")
__all__ = [
    "Acceptance",
    "AccumulatingSource",
    "Advice",
    "CommitteeEstimator",
    "ConsensusSource",
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
    "LowerLevelWarning",
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
    "PenaltyHypergradient",
    "PerSampleSource",
    "PlainStepWarning",
    "Posterior",
    "RBF",
    "RankDeficientError",
    "RankLostError",
    "RationalQuadratic",
    "RoundReport",
    "SPSASource",
    "SeparableEstimator",
    "SequentialEvaluator",
    "SmallestGradient",
    "SmoothBilevel",
    "VectorizedEvaluator",
    "WithinTolerance",
    "WorkerLostError",
    "WorkersEvaluator",
    "advise",
    "cbo_minimize",
    "maid",
    "minimize",
    "minimize_gns",
    "regularise",
    "scipy_method",
    "solve_bilevel",
]
