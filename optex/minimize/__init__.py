"""minimize: SciPy-style front doors: one deterministic function of one array; bilevel problems."""

from optex.minimize.function import minimize, scipy_method
from optex.minimize.maid import maid

__all__ = ["maid", "minimize", "scipy_method"]
