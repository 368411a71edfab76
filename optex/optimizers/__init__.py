"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.adagrad_norm import AdaGradNorm
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["AdaGradNorm", "StepRule", "check_number"]
