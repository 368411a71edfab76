"""minimize: a SciPy-style front door over OptEx, for one deterministic function of one array."""

from optex.minimize.function import minimize, scipy_method

__all__ = ["minimize", "scipy_method"]
