"""An optimizer's ``repr``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from optex.estimators import CommitteeEstimator, Estimator
from optex.evaluators import Evaluator
from optex.round.acceptance import Acceptance

__all__ = ["described"]


class _Described(Protocol):
    """What the description is made from."""

    parallelism: int
    history_size: int
    base: Optimizer

    @property
    def estimator(self) -> Estimator: ...
    @property
    def acceptance(self) -> Acceptance: ...
    @property
    def evaluator(self) -> Evaluator: ...
    @property
    def steps_taken(self) -> int: ...
    @property
    def batches_drawn(self) -> int: ...


def described(optimizer: _Described) -> str:
    """Base optimizer, settings and progress in four lines."""
    estimator = optimizer.estimator
    what = repr(estimator)
    if isinstance(estimator, CommitteeEstimator):
        what = f"CommitteeEstimator of {len(estimator.members)}"
    return (
        f"OptEx({_base(optimizer.base)}\n"
        f"      parallelism={optimizer.parallelism}, history_size={optimizer.history_size}, {what}\n"
        f"      {optimizer.acceptance!r}, {type(optimizer.evaluator).__name__}\n"
        f"      {optimizer.steps_taken} steps taken, {optimizer.batches_drawn} batches drawn)"
    )


def _base(base: Optimizer) -> str:
    parameters: list[Tensor] = [p for group in base.param_groups for p in group["params"]]
    rates = dict.fromkeys(f"{float(group.get('lr', 1)):g}" for group in base.param_groups)
    numbers = sum(p.numel() for p in parameters)
    return f"{type(base).__name__}, lr {' or '.join(rates)}, {len(parameters)} tensors of {numbers:,} numbers"
