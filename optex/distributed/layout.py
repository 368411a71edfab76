"""How the vectors of a run lie in memory: whole in every process, or split among ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.distributed.ranks import Ranks
from optex.distributed.sharding import ShardedStepper, ShardedVector
from optex.stepping import ELEMENTWISE, FlatStepper, ParameterVector, Stepper

__all__ = ["lay_out"]


def lay_out(
    base: Optimizer,
    parameters: Sequence[Tensor],
    scheduler: LRScheduler | None,
    ranks: Ranks | None,
    shard: bool | None,
    flat: bool = False,
) -> Stepper:
    """The base optimizer ready to step, on whole vectors or on this rank's slices.

    Args:
        base, scheduler: as in ``OptEx``.
        parameters: those that are trained.
        ranks: the processes that take part; None where this one is alone.
        shard: whether to split. None splits where the base is known to step every coordinate by itself
            (``optex.stepping.ELEMENTWISE``) and has no step hooks, which would see slices.
        flat: whether to step one tensor a group where the base allows it; see ``FlatStepper``.

    Raises:
        ValueError: ``shard`` is True, and there are no ranks.
        TypeError: the base optimizer cannot be built over slices.
    """
    plain = FlatStepper if flat and type(base) in ELEMENTWISE else Stepper
    if ranks is None:
        if shard:
            raise ValueError(
                "OptEx: shard=True splits vectors among ranks, and there are none; pass "
                "evaluator=optex.DistributedEvaluator()"
            )
        return plain(base, ParameterVector(parameters), scheduler)
    if shard is None:
        hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
        shard = type(base) in ELEMENTWISE and not hooks
    if shard:
        return ShardedStepper(base, ShardedVector(parameters, ranks), scheduler)
    return plain(base, ParameterVector(parameters), scheduler)
