"""L-BFGS, a quasi-Newton method, with one gradient a round."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from optex.studies.baselines.interface import Recorder, Setting, Trace
from optex.studies.problems import Problem

__all__ = ["lbfgs"]


class _RoundsUsedUpError(Exception):
    """Leaves ``torch.optim.LBFGS`` in the middle of a line search."""


def lbfgs(problem: Problem, setting: Setting) -> Trace:
    """``torch.optim.LBFGS`` with strong-Wolfe line search; every evaluation of its closure is a round.

    It cannot use N gradients at once, as each trial point follows from the one before. The loss after a round
    is that of the next point, which may be a trial point of the line search; a round that only shortens a step
    accepts no step. Its learning rate is 1 whatever the base optimizer's is. Where the problem has minibatches,
    each iteration keeps one for its whole line search.
    """
    with Recorder(problem, setting.rounds) as recorder:
        batches = problem.batches()
        optimizer = torch.optim.LBFGS(
            problem.parameters(),
            lr=1.0,
            max_iter=setting.rounds + 1 if problem.deterministic else 1,
            max_eval=sys.maxsize,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        closure = _RecordingClosure(problem, optimizer, recorder)
        try:
            while True:
                closure.batch = next(batches)
                optimizer.step(closure)
        except _RoundsUsedUpError:
            pass
    return recorder.trace(lr=1.0)


class _RecordingClosure:
    """The closure for torch; a call first records the evaluation before it as a round."""

    def __init__(self, problem: Problem, optimizer: torch.optim.LBFGS, recorder: Recorder) -> None:
        self.batch: object = None
        self._source = problem.source()
        self._optimizer = optimizer
        self._recorder = recorder
        self._evaluated = False
        self._iterations = 0

    def __call__(self) -> Tensor:
        if self._evaluated:
            iterations = self._optimizer.state[self._optimizer.param_groups[0]["params"][0]].get("n_iter", 0)
            self._recorder.round(gradients=1, accepted=iterations - self._iterations)
            self._iterations = iterations
        if self._recorder.done:
            raise _RoundsUsedUpError
        self._evaluated = True
        self._optimizer.zero_grad()
        with torch.enable_grad():
            return self._source.gradient(self.batch)[0]
