"""MKOR and MKOR-H: a layer's gradient is multiplied by two inverse factors, kept by rank-1 updates.

Mohammad Mozaffari, Sikan Li, Zhao Zhang, Maryam Mehri Dehnavi: "MKOR: Momentum-Enabled Kronecker-Factor-Based
Optimizer Using Rank-1 Updates", NeurIPS 2023, arXiv 2306.01685. ``factors.py`` has the rank-1 updates,
``capture.py`` the vectors for these, ``switch.py`` the rule of MKOR-H.
"""

from optex.optimizers.mkor.optimizer import MKOR

__all__ = ["MKOR"]
