"""Sketched gradients: s numbers in place of d, by a random matrix that both ends draw from one seed.

Song, Wang, Yu, Zhang: *Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel and
Vulnerability*, ICML 2023, arXiv 2210.08371.
"""

from optex.sources.sketched.leakage import Leakage, leakage_attack
from optex.sources.sketched.privacy import GaussianMechanism
from optex.sources.sketched.ranks import SketchState, sketched_hook
from optex.sources.sketched.sketch import Sketch
from optex.sources.sketched.source import SketchedSource

__all__ = [
    "GaussianMechanism",
    "Leakage",
    "Sketch",
    "SketchState",
    "SketchedSource",
    "leakage_attack",
    "sketched_hook",
]
