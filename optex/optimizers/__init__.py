"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.mkor import MKOR
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["MKOR", "StepRule", "check_number"]
