"""minimize: SciPy-style front doors for one deterministic function of one array, over OptEx and over GNS."""

from optex.minimize.bilevel import solve_bilevel
from optex.minimize.consensus import cbo_minimize
from optex.minimize.federated import federated_minimize
from optex.minimize.function import minimize, scipy_method
from optex.minimize.gns import minimize_gns
from optex.minimize.maid import maid
from optex.minimize.policy import policy_gradient
from optex.minimize.reweight import reweight_sources

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
