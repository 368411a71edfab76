"""Deep conjugate directions: conjugate gradients whose directions a network proposes.

Kaneda, Akar, Chen, Kala, Hyde, Teran: *A Deep Conjugate Direction Method for Iteratively Solving Linear
Systems*, ICML 2023, arXiv 2205.10763.
"""

from optex.solvers.dcdm.iteration import dcdm
from optex.solvers.dcdm.loss import DCDMLoss
from optex.solvers.dcdm.network import DirectionNetwork
from optex.solvers.dcdm.ritz import RitzVectors, ritz_vectors

__all__ = ["DCDMLoss", "DirectionNetwork", "RitzVectors", "dcdm", "ritz_vectors"]
