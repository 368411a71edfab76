"""M-FAC: products with the inverse of an empirical Fisher matrix that is never written down.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
NeurIPS 2021, arXiv 2107.03356. ``dynamic.py`` steps with the Fisher matrix of the last gradients, ``static.py``
prunes with that of a fixed set of gradients; ``fisher.py`` has the algebra that both need.
"""

from optex.optimizers.mfac.dynamic import MFAC
from optex.optimizers.mfac.static import (
    gradient_rows,
    inverse_diagonal,
    inverse_product,
    obs_mask,
    obs_update,
)

__all__ = ["MFAC", "gradient_rows", "inverse_diagonal", "inverse_product", "obs_mask", "obs_update"]
