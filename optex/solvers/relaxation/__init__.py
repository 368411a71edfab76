"""Learning to relax: SOR, CG preconditioned by SSOR, and bandits that choose ω from what solves cost.

Khodak, Chow, Balcan, Talwalkar: *Learning to Relax: Setting Solver Parameters Across a Sequence of Linear
System Instances*, ICLR 2024, arXiv 2310.02246.
"""

from optex.solvers.relaxation.bandit import BanditTuner
from optex.solvers.relaxation.sor import optimal_omega, sor
from optex.solvers.relaxation.ssor_pcg import ssor_pcg

__all__ = ["BanditTuner", "optimal_omega", "sor", "ssor_pcg"]
