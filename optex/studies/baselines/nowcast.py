"""Weight nowcasting: now and then the run jumps along its own extrapolated path, if the loss is lower there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from optex.evaluators import RandomDraws
from optex.stepping import ParameterVector, Stepper
from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.baselines.line_search import lowest, step_factors
from optex.studies.baselines.points import Points
from optex.studies.problems import Problem

__all__ = ["dynamic_modes", "linear", "nowcast", "nowcast_dmd"]

_TRAIL: Final = 8  # iterates to extrapolate from, and steps between two jumps
_SMALLEST: Final = 1e-3  # singular value of a mode that is kept, over the largest

Extrapolate = Callable[[Tensor, list[int]], Tensor]  # iterates [m, d], steps ahead: points [n, d]


def nowcast(problem: Problem, setting: Setting) -> Trace:
    """The base optimizer, and after every 8 steps a jump along the straight line through its last 8 iterates.

    The loss on the next batch decides how far it jumps: it is evaluated, with its gradient and all in one
    round, at the present point and at N - 1 points ahead, whose distances are 8 steps times powers of two about
    1 (N = 8: 1, 2, ..., 64 steps). The point of lowest loss is kept, and the next step starts there, with the
    gradient measured there; the base optimizer's state is left as it is. With N = 1 there is one point, 8 steps
    ahead, which costs a round of its own.

    Source: Kamarthi, Pittner, *Accelerating neural network training using weight extrapolations*, Neural
    Networks 12, 1999. Jang et al., *Learning to boost training by periodic nowcasting near future weights*,
    ICML 2023, learn the extrapolation.
    """
    return _run(problem, setting, linear)


def nowcast_dmd(problem: Problem, setting: Setting) -> Trace:
    """As ``nowcast``, with the path extrapolated by the linear dynamics that fit its last steps best.

    Source: Dogra, Redman, *Optimizing neural networks via Koopman operator theory*, NeurIPS 2020; Tu et al.,
    *On dynamic mode decomposition: theory and applications*, Journal of Computational Dynamics 1, 2014.
    """
    return _run(problem, setting, dynamic_modes)


def linear(
    iterates: Tensor,  # [m, d], oldest first
    ahead: list[int],  # [n], steps
) -> Tensor:  # [n, d]
    """Points so many steps ahead of the last iterate, along the slope of the least-squares line through all.

    >>> import torch
    >>> linear(torch.tensor([[0.0], [1.0], [2.0]]), [1, 10]).tolist()
    [[3.0], [12.0]]
    """
    times = torch.arange(len(iterates), dtype=iterates.dtype, device=iterates.device)
    times = times - times.mean()
    slope = times @ (iterates - iterates[-1]) / times.square().sum()
    return iterates[-1] + iterates.new_tensor(ahead)[:, None] * slope


def dynamic_modes(
    iterates: Tensor,  # [m, d], oldest first, m at least 3
    ahead: list[int],  # [n], steps
) -> Tensor:  # [n, d]
    """Points so many steps v_{j+1} = A v_j ahead of the last iterate, with A fitted to the steps so far.

    The m - 1 steps so far are the differences of the iterates. With X = [v_0 .. v_{m-3}] = U Σ Wᵀ and Y = [v_1
    .. v_{m-2}], A = U (Uᵀ Y W Σ⁻¹) Uᵀ acts on the span of all steps but the last, without the directions of
    singular values below a thousandth of the largest.

    >>> import torch
    >>> halving = torch.tensor([[8.0], [4.0], [2.0], [1.0]], dtype=torch.float64)
    >>> dynamic_modes(halving, [1, 3]).round(decimals=6).tolist()
    [[0.5], [0.125]]
    """
    steps = iterates.diff(dim=0).double()  # [m - 1, d]
    before, after = steps[:-1].T, steps[1:].T  # X and Y
    U, sigma, Wt = torch.linalg.svd(before, full_matrices=False)
    kept = sigma > _SMALLEST * sigma[0]
    U, sigma, Wt = U[:, kept], sigma[kept], Wt[kept]
    A = (U.T @ after) @ (Wt.T / sigma)  # [r, r]
    velocity, moved, reached = U.T @ steps[-1], torch.zeros_like(sigma), {}
    for step in range(1, max(ahead) + 1):
        velocity = A @ velocity
        moved = moved + velocity
        reached[step] = moved
    return iterates[-1] + (torch.stack([reached[step] for step in ahead]) @ U.T).to(iterates.dtype)


def _run(problem: Problem, setting: Setting, extrapolate: Extrapolate) -> Trace:
    base = setting.base_optimizer(problem)
    lr = base.param_groups[0]["lr"]
    vector = ParameterVector(problem.parameters())
    evaluator = Points(problem, vector)
    factors = step_factors(max(1, setting.parallelism - 1)).tolist()
    ahead = sorted({max(1, round(_TRAIL * factor)) for factor in factors})
    trail: deque[Tensor] = deque(maxlen=_TRAIL)
    since = 0
    with Recorder(problem, setting.rounds) as recorder:
        stepper, batches = Stepper(base, vector), problem.batches()
        while not recorder.done:
            here = stepper.point
            trail.append(here)
            points = here[None]
            if since >= _TRAIL:
                jumps = extrapolate(torch.stack(list(trail)), ahead)
                points, since = torch.cat([points, jumps[jumps.isfinite().all(1)]]), 0
            batch, draws, parts = next(batches), RandomDraws(), []
            for part in points.split(setting.parallelism):
                if parts:  # the points do not fit into one round; the one before takes no step
                    evaluator.keep(0)
                    recorder.round(gradients=len(parts[-1].losses), accepted=0)
                    if recorder.done:
                        return recorder.trace(lr)
                count = len(part)
                parts.append(evaluator.evaluate(part, [batch] * count, [draws] * count))
            kept = lowest("nowcast", torch.cat([part.losses for part in parts]))
            evaluator.keep(min(kept, len(parts[-1].losses) - 1))
            if kept:
                trail.clear()  # the iterates before a jump do not lie on the path that starts after it
            vector.write(points[kept])
            stepper.step(torch.cat([part.gradients for part in parts])[kept])
            since += 1
            recorder.round(gradients=len(parts[-1].losses), accepted=1)
    return recorder.trace(lr)
