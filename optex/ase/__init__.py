"""ASE's front door: an optimizer of ``ase.optimize`` that evaluates the forces of several images at once."""

try:
    import ase.optimize.optimize
    import ase.utils.abc  # noqa: F401
except ImportError as error:
    raise ImportError(f"optex.ase needs ASE, 3.26 or later ({error}): pip install 'optex[ase]'") from error

from optex.ase.optimizer import OptExOptimizer

__all__ = ["OptExOptimizer"]
