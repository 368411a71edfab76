"""Loss terms of the family; a paper a file."""

from optex.regularisers.ode import (
    Flow,
    GlobalRegularizer,
    LocalRegularizer,
    RegularisedObjective,
    Regularizer,
    regularise,
)

__all__ = [
    "REGULARISERS",
    "Flow",
    "GlobalRegularizer",
    "LocalRegularizer",
    "RegularisedObjective",
    "Regularizer",
    "regularise",
]

# What `optex list` says of each.
REGULARISERS: dict[str, str] = {
    "regularise": "neural differential equations that take fewer evaluations to solve (2105.03918, 2303.02262)",
}
