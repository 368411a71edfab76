"""Policy gradients from sampled trajectories: the source, environments, and policies."""

from optex.sources.policy.control import GymnasiumEnvironment
from optex.sources.policy.environment import Environment, Episodes, LinearQuadratic
from optex.sources.policy.policies import GaussianPolicy, SoftmaxPolicy, policy_for
from optex.sources.policy.source import TrajectorySource
from optex.sources.policy.trajectories import Trajectories

__all__ = [
    "Environment",
    "Episodes",
    "GaussianPolicy",
    "GymnasiumEnvironment",
    "LinearQuadratic",
    "SoftmaxPolicy",
    "Trajectories",
    "TrajectorySource",
    "policy_for",
]
