"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["StepRule", "check_number"]
