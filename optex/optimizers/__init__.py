"""The family's step rules: ``torch.optim.Optimizer``s, one paper a file."""

from optex.optimizers.mezo import BlockStreamer, MeZO, Traffic, language_model_blocks
from optex.optimizers.step_rule import StepRule, check_number

__all__ = [
    "BlockStreamer",
    "MeZO",
    "StepRule",
    "Traffic",
    "check_number",
    "language_model_blocks",
]
