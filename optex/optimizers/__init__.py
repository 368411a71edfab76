"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.mfac import MFAC
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["MFAC", "StepRule", "check_number"]
