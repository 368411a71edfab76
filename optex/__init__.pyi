from optex import batching as batching
from optex import distributed as distributed
from optex import errors as errors
from optex import estimators as estimators
from optex import evaluators as evaluators
from optex import optimizers as optimizers
from optex import regularisers as regularisers
from optex import solvers as solvers
from optex import sources as sources
from optex import stepping as stepping
from optex import theory as theory
from optex.advice import Advice as Advice
from optex.advice import advise as advise
from optex.errors import ConvergenceWarning as ConvergenceWarning
from optex.errors import JitterWarning as JitterWarning
from optex.errors import LowerLevelWarning as LowerLevelWarning
from optex.errors import NonFiniteError as NonFiniteError
from optex.errors import NonFiniteWarning as NonFiniteWarning
from optex.errors import NotDeterministicWarning as NotDeterministicWarning
from optex.errors import NotPositiveDefiniteError as NotPositiveDefiniteError
from optex.errors import PlainStepWarning as PlainStepWarning
from optex.errors import RankDeficientError as RankDeficientError
from optex.errors import RankLostError as RankLostError
from optex.errors import WorkerLostError as WorkerLostError
from optex.estimators import CommitteeEstimator as CommitteeEstimator
from optex.estimators import CurlFreeEstimator as CurlFreeEstimator
from optex.estimators import Estimator as Estimator
from optex.estimators import GradientHistory as GradientHistory
from optex.estimators import HoldLast as HoldLast
from optex.estimators import Posterior as Posterior
from optex.estimators import SeparableEstimator as SeparableEstimator
from optex.estimators.kernels import RBF as RBF
from optex.estimators.kernels import Kernel as Kernel
from optex.estimators.kernels import Matern12 as Matern12
from optex.estimators.kernels import Matern32 as Matern32
from optex.estimators.kernels import Matern52 as Matern52
from optex.estimators.kernels import RationalQuadratic as RationalQuadratic
from optex.evaluators import DistributedEvaluator as DistributedEvaluator
from optex.evaluators import Evaluation as Evaluation
from optex.evaluators import EvaluationRequest as EvaluationRequest
from optex.evaluators import Evaluator as Evaluator
from optex.evaluators import SequentialEvaluator as SequentialEvaluator
from optex.evaluators import VectorizedEvaluator as VectorizedEvaluator
from optex.evaluators import WorkersEvaluator as WorkersEvaluator
from optex.minimizers import cbo_minimize as cbo_minimize
from optex.minimizers import federated_minimize as federated_minimize
from optex.minimizers import maid as maid
from optex.minimizers import minimize as minimize
from optex.minimizers import minimize_gns as minimize_gns
from optex.minimizers import policy_gradient as policy_gradient
from optex.minimizers import reweight_sources as reweight_sources
from optex.minimizers import scipy_method as scipy_method
from optex.minimizers import solve_bilevel as solve_bilevel
from optex.optimizer import OptEx as OptEx
from optex.regularisers import regularise as regularise
from optex.round import Acceptance as Acceptance
from optex.round import Last as Last
from optex.round import LowestLoss as LowestLoss
from optex.round import RoundReport as RoundReport
from optex.round import SmallestGradient as SmallestGradient
from optex.round import WithinTolerance as WithinTolerance
from optex.round import streamed as streamed
from optex.solvers import BanditTuner as BanditTuner
from optex.solvers import SparseOTLoss as SparseOTLoss
from optex.solvers import dcdm as dcdm
from optex.solvers import equality_method as equality_method
from optex.solvers import minimize_equality as minimize_equality
from optex.solvers import newton_schulz_inverse as newton_schulz_inverse
from optex.solvers import sor as sor
from optex.solvers import sparse_ot as sparse_ot
from optex.solvers import ssor_pcg as ssor_pcg
from optex.sources import AccumulatingSource as AccumulatingSource
from optex.sources import BlockLoss as BlockLoss
from optex.sources import ConsensusSource as ConsensusSource
from optex.sources import CoordinateSource as CoordinateSource
from optex.sources import DynamicMask as DynamicMask
from optex.sources import Environment as Environment
from optex.sources import Episodes as Episodes
from optex.sources import GaussianMechanism as GaussianMechanism
from optex.sources import GaussianPolicy as GaussianPolicy
from optex.sources import GradientSource as GradientSource
from optex.sources import GymnasiumEnvironment as GymnasiumEnvironment
from optex.sources import InexactBilevelSource as InexactBilevelSource
from optex.sources import LayerSampler as LayerSampler
from optex.sources import LinearQuadratic as LinearQuadratic
from optex.sources import LowerLevelError as LowerLevelError
from optex.sources import MinimaxPenaltySource as MinimaxPenaltySource
from optex.sources import ObjectiveSource as ObjectiveSource
from optex.sources import PenaltyHypergradient as PenaltyHypergradient
from optex.sources import PerSampleSource as PerSampleSource
from optex.sources import SemiDualSource as SemiDualSource
from optex.sources import Sketch as Sketch
from optex.sources import SketchedSource as SketchedSource
from optex.sources import SketchState as SketchState
from optex.sources import SmoothBilevel as SmoothBilevel
from optex.sources import SoftmaxPolicy as SoftmaxPolicy
from optex.sources import SourceWeights as SourceWeights
from optex.sources import SPSASource as SPSASource
from optex.sources import TrajectorySource as TrajectorySource
from optex.sources import leakage_attack as leakage_attack
from optex.sources import sketched_hook as sketched_hook
from optex.sources import zo_grasp_ratios as zo_grasp_ratios

__version__: str
__all__ = [
    "streamed",
    "regularise",
    "Acceptance",
    "AccumulatingSource",
    "Advice",
    "BanditTuner",
    "BlockLoss",
    "CommitteeEstimator",
    "ConsensusSource",
    "ConvergenceWarning",
    "CoordinateSource",
    "CurlFreeEstimator",
    "DistributedEvaluator",
    "DynamicMask",
    "Environment",
    "Episodes",
    "Estimator",
    "Evaluation",
    "EvaluationRequest",
    "Evaluator",
    "GaussianMechanism",
    "GaussianPolicy",
    "GradientHistory",
    "GradientSource",
    "GymnasiumEnvironment",
    "HoldLast",
    "InexactBilevelSource",
    "JitterWarning",
    "Kernel",
    "Last",
    "LayerSampler",
    "LinearQuadratic",
    "LowerLevelError",
    "LowerLevelWarning",
    "LowestLoss",
    "Matern12",
    "Matern32",
    "Matern52",
    "MinimaxPenaltySource",
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
    "SemiDualSource",
    "SeparableEstimator",
    "SequentialEvaluator",
    "Sketch",
    "SketchState",
    "SketchedSource",
    "SmallestGradient",
    "SmoothBilevel",
    "SoftmaxPolicy",
    "SourceWeights",
    "SparseOTLoss",
    "TrajectorySource",
    "VectorizedEvaluator",
    "WithinTolerance",
    "WorkerLostError",
    "WorkersEvaluator",
    "advise",
    "cbo_minimize",
    "dcdm",
    "equality_method",
    "federated_minimize",
    "leakage_attack",
    "maid",
    "minimize",
    "minimize_equality",
    "minimize_gns",
    "newton_schulz_inverse",
    "policy_gradient",
    "reweight_sources",
    "scipy_method",
    "sketched_hook",
    "solve_bilevel",
    "sor",
    "sparse_ot",
    "ssor_pcg",
    "zo_grasp_ratios",
]
