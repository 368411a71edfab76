"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.adahessian import AdaHessian, hutchinson_diagonal
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["AdaHessian", "StepRule", "check_number", "hutchinson_diagonal"]
