"""torchode's solver, with every step of it written down: sizes, stages, embedded errors, what was accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from optex.errors import NonFiniteError

__all__ = ["Solve", "Steps", "check_tolerances", "first_size", "one_step", "require_torchode", "solve"]

VectorField = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Steps:
    """Steps of Tsit5, each of n rows that are solved for themselves.

    Attributes:
        start: [s, n], when a step begins.
        size: [s, n], h, without a graph; negative where time runs backwards.
        before, after: [s, n, d], u and u⁺.
        error: [s, n, d], the difference of fifth and fourth order.
        stages: [s, 7, n, d], k_1 to k_7.
        accepted: [s, n], what belongs to the solution; steps that were tried and rejected do not, nor do those
            that a finished row takes part in until the others end.
    """

    start: Tensor
    size: Tensor
    before: Tensor
    after: Tensor
    error: Tensor
    stages: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Solve:
    """What is known of a solve.

    Attributes:
        field: the vector field, of times [n] and flat states [n, d].
        steps: all of its steps.
        end: [n], where it ends.
        rtol, atol: its tolerances.
        evaluations: calls of the field.
    """

    field: VectorField
    steps: Steps
    end: Tensor
    rtol: float
    atol: float
    evaluations: int

    def step_at(
        self,
        times: Tensor,  # [n]
    ) -> Tensor:  # [n]
        """For each row the index of the accepted step that its time lies in."""
        reached = (times - self.steps.start) * self.steps.size.sign() >= 0
        order = torch.arange(len(self.steps.start), device=times.device)[:, None]
        return (order * (reached & self.steps.accepted)).amax(0)

    def state_at(
        self,
        times: Tensor,  # [n]
    ) -> Tensor:  # [n, d]
        """The states at a time of each row by the solver's interpolant: no graph, no call of the field."""
        torchode, steps = require_torchode(), self.steps
        step, rows = self.step_at(times), torch.arange(len(times), device=times.device)
        method = torchode.Tsit5()
        picked = torchode.single_step_methods.runge_kutta.ERKInterpolationData(
            method.tableau.to(times.device, times.dtype, steps.before.dtype),
            steps.start[step, rows],
            steps.size[step, rows],
            steps.before[step, rows].detach(),
            steps.after[step, rows].detach(),
            steps.stages[step, :, rows].detach().transpose(0, 1),
        )
        return method.build_interpolation(picked).evaluate(times, rows)


def require_torchode() -> ModuleType:
    """torchode, which has Tsit5 with its stages and embedded error; torchdiffeq has neither to hand out.

    Raises:
        ImportError: it is not there.
    """
    try:
        import torchode
        import torchode.single_step_methods.runge_kutta
    except ImportError as error:
        raise ImportError(
            f'optex.regularisers.ode needs torchode ({error}): pip install "optex[odes]"'
        ) from error
    return torchode


def check_tolerances(owner: str, rtol: float, atol: float, dtype: torch.dtype) -> None:
    """Refuse tolerances that states of this dtype cannot show.

    Raises:
        ValueError: both are below the spacing of its numbers, so that the error is rounding.
    """
    spacing = torch.finfo(dtype).eps
    if max(rtol, atol) < spacing:
        raise ValueError(
            f"{owner}: rtol={rtol:g} and atol={atol:g} are below what {dtype} resolves, {spacing:.2g}; "
            "solve in float64, or loosen one of them"
        )


@dataclass
class _Recorder:
    """The steps that ``_Method`` sees, each with whether ``_Controller`` saw it accepted."""

    steps: list[tuple[Tensor, ...]] = field(default_factory=list)
    pending: tuple[Tensor, ...] = ()

    def stacked(self) -> Steps:
        return Steps(*(torch.stack(column) for column in zip(*self.steps, strict=True)))


class _Method:
    """A method of torchode whose steps are recorded; the rest is the method's own."""

    def __init__(self, method: Any, recorder: _Recorder) -> None:
        self._method, self._recorder = method, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def step(
        self,
        term: Any,
        running: Tensor,  # [n]
        y0: Tensor,  # [n, d]
        t0: Tensor,  # [n]
        dt: Tensor,  # [n]
        state: Any,
        **options: Any,
    ) -> Any:
        found = self._method.step(term, running, y0, t0, dt, state, **options)
        result, data = found[0], found[1]
        self._recorder.pending = (t0, dt.detach(), y0, result.y, result.error_estimate, data.k, running)
        return found


class _Controller:
    """A controller of torchode; what it accepts is recorded."""

    def __init__(self, controller: Any, recorder: _Recorder) -> None:
        self._controller, self._recorder = controller, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)

    def adapt_step_size(self, *arguments: Any) -> Any:
        found = self._controller.adapt_step_size(*arguments)
        *step, running = self._recorder.pending
        self._recorder.steps.append((*step, found[0] & running))
        return found


def solve(
    vector_field: VectorField,
    start: Tensor,  # [n, d]
    times: Tensor,  # [m]
    rtol: float,
    atol: float,
    max_steps: int,
    *,
    record: bool,
) -> tuple[Tensor, int, Solve | None]:  # [n, m, d]
    """States at the times, calls of the field, and the recorded solve with ``record``, else None.

    Sizes of steps have no graph: gradients are those of the steps that were taken.

    Raises:
        NonFiniteError: the state, or the field at it, is NaN or infinite.
        RuntimeError: the last time is not reached in ``max_steps`` steps.
    """
    torchode, recorder = require_torchode(), _Recorder()
    term = torchode.ODETerm(vector_field)
    method: Any = torchode.Tsit5(term)
    controller: Any = torchode.IntegralController(atol, rtol, term=term).to(start.device)
    if record:
        method, controller = _Method(method, recorder), _Controller(controller, recorder)
    adjoint = torchode.AutoDiffAdjoint(
        method, controller, max_steps=max_steps, backprop_through_step_size_control=False
    )
    rows = times.expand(len(start), -1)
    problem = torchode.InitialValueProblem(start, rows[:, 0], rows[:, -1], rows)
    found = adjoint.solve(problem, term)
    _check_status(torchode, int(found.status.max()), max_steps, rtol, atol)
    evaluations = int(found.stats["n_f_evals"].max())
    if not record:
        return found.ys, evaluations, None
    known = Solve(vector_field, recorder.stacked(), rows[:, -1], rtol, atol, evaluations)
    return found.ys, evaluations, known


def _check_status(torchode: ModuleType, status: int, max_steps: int, rtol: float, atol: float) -> None:
    if status == torchode.Status.INFINITE_NORM.value:
        raise NonFiniteError("Flow: the state, or the field at it, is NaN or infinite; the field blows up")
    if status != torchode.Status.SUCCESS.value:
        raise RuntimeError(
            f"Flow: the end was not reached in max_steps={max_steps} steps at rtol={rtol:g}, atol={atol:g}; "
            "allow more, loosen the tolerances, or regularise more"
        )


def one_step(
    vector_field: VectorField,
    times: Tensor,  # [n]
    state: Tensor,  # [n, d], without a graph
    size: Tensor,  # [n], without a graph
    *,
    first_stage: bool,
) -> Steps:
    """One step of Tsit5 from a time of each row; with ``first_stage`` False the first stage has no graph."""
    torchode = require_torchode()
    term = torchode.ODETerm(vector_field, with_stats=False)
    method = torchode.Tsit5(term)
    problem = torchode.InitialValueProblem(state, times, times + size)
    slope = None
    if not first_stage:
        with torch.no_grad():
            slope = vector_field(times, state)
    begun = method.init(term, problem, slope, stats={}, args=None)
    every = torch.ones_like(times, dtype=torch.bool)
    result, data, *_ = method.step(term, every, state, times, size, begun, stats={}, args=None)
    step = (times, size, state, result.y, result.error_estimate, data.k, every)
    return Steps(*(part[None] for part in step))


@torch.no_grad()
def first_size(
    vector_field: VectorField,
    times: Tensor,  # [n]
    state: Tensor,  # [n, d]
    end: Tensor,  # [n]
    rtol: float,
    atol: float,
) -> Tensor:  # [n]
    """The size of the first step that torchode's controller would try, at most what is left to the end."""
    torchode = require_torchode()
    term = torchode.ODETerm(vector_field, with_stats=False)
    controller = torchode.IntegralController(atol, rtol, term=term).to(state.device)
    problem = torchode.InitialValueProblem(state, times, end)
    size = controller.init(term, problem, 5, None, stats={}, args=None)[0]
    left = end - times
    return torch.where(left > 0, torch.minimum(size, left), torch.maximum(size, left))
