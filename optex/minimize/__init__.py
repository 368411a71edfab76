"""SciPy-style front doors: OptEx for one deterministic function of one array; methods that solve without it."""

from optex.minimize.consensus import cbo_minimize
from optex.minimize.function import minimize, scipy_method

__all__ = ["cbo_minimize", "minimize", "scipy_method"]
