"""optex: first-order optimizers with fewer gradients, and several at once.

Shu, Fang, He, Yu: *OptEx: Expediting First-Order Optimization with Approximately Parallelized Iterations*,
NeurIPS 2024, arXiv 2402.11427, and what goes past it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("optex")

# The module of each public name; __init__.pyi says the same to type checkers. A name is loaded when it is first
# used: importing torch takes a second or two, and `optex --help` is to answer at once.
_HOMES = {
    "optex.regularisers": ("regularise",),
    "optex.advice": (
        "Advice",
        "advise",
    ),
    "optex.errors": (
        "ConvergenceWarning",
        "JitterWarning",
        "LowerLevelWarning",
        "NonFiniteError",
        "NonFiniteWarning",
        "NotDeterministicWarning",
        "NotPositiveDefiniteError",
        "PlainStepWarning",
        "RankDeficientError",
        "RankLostError",
        "WorkerLostError",
    ),
    "optex.estimators": (
        "CommitteeEstimator",
        "CurlFreeEstimator",
        "Estimator",
        "GradientHistory",
        "HoldLast",
        "Posterior",
        "SeparableEstimator",
    ),
    "optex.estimators.kernels": (
        "Kernel",
        "Matern12",
        "Matern32",
        "Matern52",
        "RBF",
        "RationalQuadratic",
    ),
    "optex.evaluators": (
        "DistributedEvaluator",
        "Evaluation",
        "EvaluationRequest",
        "Evaluator",
        "SequentialEvaluator",
        "VectorizedEvaluator",
        "WorkersEvaluator",
    ),
    "optex.minimizers": (
        "cbo_minimize",
        "federated_minimize",
        "maid",
        "minimize",
        "minimize_gns",
        "policy_gradient",
        "reweight_sources",
        "scipy_method",
        "solve_bilevel",
    ),
    "optex.optimizer": ("OptEx",),
    "optex.round": (
        "streamed",
        "Acceptance",
        "Last",
        "LowestLoss",
        "RoundReport",
        "SmallestGradient",
        "WithinTolerance",
    ),
    "optex.solvers": (
        "BanditTuner",
        "SparseOTLoss",
        "dcdm",
        "equality_method",
        "minimize_equality",
        "newton_schulz_inverse",
        "sor",
        "sparse_ot",
        "ssor_pcg",
    ),
    "optex.sources": (
        "AccumulatingSource",
        "BlockLoss",
        "ConsensusSource",
        "CoordinateSource",
        "DynamicMask",
        "Environment",
        "Episodes",
        "GaussianMechanism",
        "GaussianPolicy",
        "GradientSource",
        "GymnasiumEnvironment",
        "InexactBilevelSource",
        "LayerSampler",
        "LinearQuadratic",
        "LowerLevelError",
        "MinimaxPenaltySource",
        "ObjectiveSource",
        "PenaltyHypergradient",
        "PerSampleSource",
        "SPSASource",
        "SemiDualSource",
        "Sketch",
        "SketchState",
        "SketchedSource",
        "SmoothBilevel",
        "SoftmaxPolicy",
        "SourceWeights",
        "TrajectorySource",
        "leakage_attack",
        "sketched_hook",
        "zo_grasp_ratios",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = (
    *("batching", "distributed", "errors", "estimators", "evaluators", "optimizers"),
    *("regularisers", "solvers", "sources", "stepping", "theory"),
)

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = import_module(f"optex.{name}")
    else:
        raise AttributeError(f"module 'optex' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
