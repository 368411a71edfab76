"""Neural differential equations that are easy to solve: what a solver knows of its own trouble, as a loss term.

Pal, Ma, Shah, Rackauckas: *Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing
Internal Solver Heuristics*, ICML 2021, arXiv 2105.03918; Pal, Edelman, Rackauckas: *Locally Regularized Neural
Differential Equations: Some Black Boxes Were Meant to Remain Closed!*, ICML 2023, arXiv 2303.02262.
"""

from optex.regularisers.ode.flow import Flow
from optex.regularisers.ode.heuristics import error_estimate, stiffness_estimate
from optex.regularisers.ode.objective import RegularisedObjective, regularise
from optex.regularisers.ode.recording import Solve, Steps
from optex.regularisers.ode.terms import GlobalRegularizer, LocalRegularizer, Regularizer

__all__ = [
    "Flow",
    "GlobalRegularizer",
    "LocalRegularizer",
    "RegularisedObjective",
    "Regularizer",
    "Solve",
    "Steps",
    "error_estimate",
    "regularise",
    "stiffness_estimate",
]
