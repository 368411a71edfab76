"""ASE's front door: an optimizer of ``ase.optimize`` that evaluates the forces of several images at once."""

from importlib.metadata import PackageNotFoundError, version

_NEEDS = "optex.ase needs ASE, 3.27 or later"  # before, what ASE calls a gradient was a force

try:
    _found = version("ase")
    import ase  # noqa: F401
except (ImportError, PackageNotFoundError) as _error:
    raise ImportError(f"{_NEEDS} ({_error}): pip install 'optex[ase]'") from _error
if tuple(int(part) for part in _found.split(".")[:2]) < (3, 27):
    raise ImportError(f"{_NEEDS}, and this is {_found}: pip install 'optex[ase]'")

from optex.ase.optimizer import OptExOptimizer  # noqa: E402

__all__ = ["OptExOptimizer"]
