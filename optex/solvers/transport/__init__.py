"""Sparsity-constrained optimal transport: plans with at most k nonzeros a column.

Liu, Puigcerver, Blondel: *Sparsity-Constrained Optimal Transport*, ICLR 2023, arXiv 2209.15466.
"""

from optex.solvers.transport.loss import SparseOTLoss
from optex.solvers.transport.projection import semi_dual, sparse_projection
from optex.solvers.transport.solver import sparse_ot

__all__ = ["SparseOTLoss", "semi_dual", "sparse_ot", "sparse_projection"]
