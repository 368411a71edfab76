"""Stepping: a base optimizer as something that can be walked ahead and taken back."""

from optex.stepping.bases import (
    COUNTERS,
    ELEMENTWISE,
    MODEL_OPTIMIZERS,
    OPTIMIZERS,
    base_optimizer,
    check_base,
    check_name,
    check_settings,
    default_rate,
)
from optex.stepping.flat import FlatStepper
from optex.stepping.linear import LinearRule
from optex.stepping.parameters import Buffers, GradientMask, ParameterVector
from optex.stepping.snapshot import Attributes, Hyperparameters, Snapshot
from optex.stepping.stepper import FreezesWhileDrafting, ObservesEvaluations, Stepper

__all__ = [
    "COUNTERS",
    "ELEMENTWISE",
    "MODEL_OPTIMIZERS",
    "OPTIMIZERS",
    "Attributes",
    "Buffers",
    "FlatStepper",
    "FreezesWhileDrafting",
    "GradientMask",
    "Hyperparameters",
    "LinearRule",
    "ObservesEvaluations",
    "ParameterVector",
    "Snapshot",
    "Stepper",
    "base_optimizer",
    "check_base",
    "check_name",
    "check_settings",
    "default_rate",
]
