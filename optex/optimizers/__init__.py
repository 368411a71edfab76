"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.scale import SCALE, scale_param_groups
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["SCALE", "StepRule", "check_number", "scale_param_groups"]
