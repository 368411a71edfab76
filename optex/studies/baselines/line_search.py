"""Line search: N lengths of the base optimizer's own step, tried at once."""

from __future__ import annotations

import torch
from torch import Tensor

from optex.errors import NonFiniteError
from optex.evaluators import RandomDraws
from optex.stepping import ParameterVector, Stepper
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.baselines.points import Points
from optex.studies.problems import Problem

__all__ = ["line_search", "lowest", "step_factors"]


def line_search(problem: Problem, setting: Setting) -> Trace:
    """Try the base optimizer's step at N lengths, 1 among them, and keep the one of lowest loss.

    All N points of a round are evaluated on the same batch, or noise would decide among them. Each is evaluated
    with its gradient, so that the next direction is known when the round ends: a round is one sequential
    evaluation. The first round evaluates only the start, so it takes no step.

    The base optimizer's state advances once a round, by the gradient at the point that was kept; the length
    that is then chosen does not change the state, as if the learning rate had been another for this one step.
    """
    base = setting.base_optimizer(problem)
    lr = base.param_groups[0]["lr"]
    vector = ParameterVector(problem.parameters())
    evaluator = Points(problem, vector)
    with Recorder(problem, setting.rounds) as recorder:
        stepper, batches = Stepper(base, vector), problem.batches()
        factors = step_factors(setting.parallelism).to(vector.device, vector.dtype)
        points, gradient = stepper.point[None], None
        while not recorder.done:
            if gradient is not None:
                here = stepper.point
                stepper.step(gradient)
                points = here + factors[:, None] * (stepper.point - here)
            # One batch and one set of draws for all, or losses would not compare.
            count, batch, draws = len(points), next(batches), RandomDraws()
            evaluation = evaluator.evaluate(points, [batch] * count, [draws] * count)
            kept = lowest("line-search", evaluation.losses)
            evaluator.keep(kept)
            vector.write(points[kept])
            recorder.round(gradients=len(points), accepted=0 if gradient is None else 1)
            gradient = evaluation.gradients[kept]
    return recorder.trace(lr)


def step_factors(
    parallelism: int,
) -> Tensor:  # [N]
    """Powers of two about 1: for N = 5 these are ¼, ½, 1, 2, 4; an even N has one more above 1 than below."""
    least = -((parallelism - 1) // 2)
    return 2.0 ** torch.arange(least, least + parallelism, dtype=torch.float64)


def lowest(
    method: str,
    losses: Tensor,  # [n]
) -> int:
    """Index of the lowest finite loss.

    Args:
        method: whose points they are, for the message.
        losses: at the points tried.

    Raises:
        NonFiniteError: none of the losses is finite.
    """
    finite = losses.isfinite()
    if not finite.any():
        raise NonFiniteError(f"{method}: the loss is finite at none of the points tried")
    return int(torch.where(finite, losses, torch.inf).argmin())
