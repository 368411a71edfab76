"""SciPy's quasi-Newton and conjugate-gradient methods, for deterministic objectives."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from optex.stepping import ParameterVector
from optex.studies.baselines.interface import Method, Recorder, Setting, Trace
from optex.studies.problems import Problem

__all__ = ["lbfgs_scipy", "nonlinear_cg"]

_NEVER: Final = 2**31 - 1


class _RoundsUsedUpError(Exception):
    """Leaves SciPy in the middle of a line search."""


def lbfgs_scipy(history: int) -> Method:
    """SciPy's L-BFGS-B without bounds; every evaluation of loss and gradient is a round.

    As with ``lbfgs``, N gradients at once are of no use, the learning rate is 1, and the loss after a round is
    that of the next point. Where SciPy gives up, it is started again from the point of lowest loss so far.

    Args:
        history: how many pairs of a step and a change of the gradient are kept, SciPy's ``maxcor``.

    Raises:
        ValueError: at the run, of a problem with sampled gradients.

    Source: Zhu, Byrd, Lu, Nocedal, *Algorithm 778: L-BFGS-B*, ACM TOMS 1997.
    """
    options = {"maxcor": history, "ftol": 0.0, "gtol": 0.0, "maxiter": _NEVER, "maxfun": _NEVER}
    return partial(_run, name=f"lbfgs-scipy, history {history}", method="L-BFGS-B", options=options)


def nonlinear_cg(problem: Problem, setting: Setting) -> Trace:
    """SciPy's nonlinear conjugate gradients (Polak and Ribière); otherwise as ``lbfgs_scipy``.

    Raises:
        ValueError: the problem has sampled gradients.

    Source: Nocedal, Wright, *Numerical Optimization*, 2006, pages 120-122.
    """
    return _run(problem, setting, name="nonlinear-cg", method="CG", options={"gtol": 0.0, "maxiter": _NEVER})


def _run(problem: Problem, setting: Setting, name: str, method: str, options: dict[str, Any]) -> Trace:
    if not problem.deterministic:
        raise ValueError(
            f"{name}: {problem.name} has sampled gradients, and this line search compares losses that noise "
            "would decide; take a deterministic objective, or lbfgs, which holds a batch for each search"
        )
    with Recorder(problem, setting.rounds) as recorder, np.errstate(all="ignore"):
        evaluation = _Evaluation(problem, recorder)
        try:
            while True:
                minimize(
                    evaluation,
                    evaluation.best,
                    jac=True,
                    method=method,
                    options=options,
                    callback=evaluation.iteration,
                )
        except _RoundsUsedUpError:
            pass
    return recorder.trace(lr=1.0)


class _Evaluation:
    """Loss and gradient as SciPy takes them; a call first records the evaluation before it as a round.

    Attributes:
        best: [d], the point of the lowest loss so far.
    """

    def __init__(self, problem: Problem, recorder: Recorder) -> None:
        self._source, self._recorder = problem.source(), recorder
        self._vector = ParameterVector(problem.parameters())
        self._evaluated = False
        self._iterations = 0
        self._lowest = np.inf
        self.best = self._vector.read().double().numpy()

    def iteration(self, _: Any) -> None:
        """Count a step that SciPy has taken."""
        self._iterations += 1

    def __call__(
        self,
        x: NDArray[np.float64],  # [d]
    ) -> tuple[float, NDArray[np.float64]]:  # loss, [d]
        self._vector.write(torch.from_numpy(x).to(self._vector.dtype))
        if self._evaluated:
            self._recorder.round(gradients=1, accepted=self._iterations)
            self._iterations = 0
        if self._recorder.done:
            raise _RoundsUsedUpError
        self._evaluated = True
        self._vector.clear_gradients()
        with torch.enable_grad():
            loss, _ = self._source.gradient(None)
        flat = self._vector.read_gradients()[0].double().numpy()
        self._vector.clear_gradients()
        value = float(loss)
        if value < self._lowest:
            self._lowest, self.best = value, x.copy()
        return value, flat
