"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.accelerated import NAG, HeavyBall, TripleMomentum
from optex.optimizers.step_rule import StepRule, check_number

__all__ = ["NAG", "HeavyBall", "StepRule", "TripleMomentum", "check_number"]
