"""Solvers of the family: linear systems, transport, equality constraints; a paper a file."""

from optex.solvers.outcome import Status, outcome
from optex.solvers.relaxation import BanditTuner, optimal_omega, sor, ssor_pcg

__all__ = ["SOLVERS", "BanditTuner", "Status", "optimal_omega", "outcome", "sor", "ssor_pcg"]

# What `optex list` says of each.
SOLVERS: dict[str, str] = {
    "sor": "successive over-relaxation (Young; arXiv 2310.02246)",
    "ssor-pcg": "CG preconditioned by symmetric relaxation (arXiv 2310.02246)",
    "bandit-tuner": "learns a setting from what runs cost (arXiv 2310.02246)",
}
