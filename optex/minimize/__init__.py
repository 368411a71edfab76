"""minimize: SciPy-style front doors over OptEx."""

from optex.minimize.bilevel import solve_bilevel
from optex.minimize.function import minimize, scipy_method

__all__ = ["minimize", "scipy_method", "solve_bilevel"]
