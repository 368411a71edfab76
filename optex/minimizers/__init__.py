"""SciPy-style front doors: functions that take a problem and a start, and return an ``OptimizeResult``."""

from optex.minimizers.bilevel import solve_bilevel
from optex.minimizers.consensus import cbo_minimize
from optex.minimizers.federated import federated_minimize
from optex.minimizers.function import minimize, scipy_method
from optex.minimizers.gns import minimize_gns
from optex.minimizers.maid import maid
from optex.minimizers.policy import policy_gradient
from optex.minimizers.reweight import reweight_sources

__all__ = [
    "cbo_minimize",
    "federated_minimize",
    "maid",
    "minimize",
    "minimize_gns",
    "policy_gradient",
    "reweight_sources",
    "scipy_method",
    "solve_bilevel",
]
