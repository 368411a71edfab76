"""The flow of a vector field, solved by torchode's Tsit5, row by row of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optex.checks import check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.regularisers.ode.recording import Solve, check_tolerances, require_torchode, solve

__all__ = ["Flow"]


class Flow(nn.Module):
    """The solution of u' = f(t, u) from u(t_0), a layer: a neural ordinary differential equation.

    torchode's Tsit5 with its integral controller; every row of the batch has steps of its own. Gradients go
    through the steps (discretise, then optimise), step sizes are constants.

    Args:
        field: ``field(t, u)``, a module or a function: times [n] and states of the shape of u; the slopes.
        rtol, atol: relative and absolute tolerance, not negative, one of them at least what the states' dtype
            resolves; 1e-6, 1e-6.
        max_steps: most steps a row may take, at least 1.

    Attributes:
        evaluations: how often the last solve called the field; 0 before the first.

    Raises:
        TypeError: ``field`` cannot be called.
        ValueError: a number is out of range.
        ImportError: torchode is not installed.

    >>> import torch
    >>> from optex.regularisers import Flow
    >>> decay = Flow(lambda t, u: -u)
    >>> round(decay(torch.ones(1, 1, dtype=torch.float64)).item(), 6)   # exp(-1), 0.367879
    0.36788
    >>> decay.evaluations                                         # two for the first size, six a step
    32
    """

    def __init__(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        *,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        max_steps: int = 10_000,
    ) -> None:
        super().__init__()
        if not callable(field):
            raise TypeError(f"Flow: field must be callable as field(t, u), got {shown(field)}")
        require_torchode()
        self.field: Callable[[Tensor, Tensor], Tensor] = field
        self.rtol: float = check_number("Flow", "rtol", rtol)
        self.atol: float = check_number("Flow", "atol", atol)
        self.max_steps: int = check_integer("Flow", "max_steps", max_steps)
        self.evaluations: int = 0
        self._solves: list[Solve] | None = None

    def forward(
        self,
        state: Tensor,  # [n, ...]
        times: Tensor | None = None,  # [m]
    ) -> Tensor:  # [n, ...], or [n, m, ...]
        """Follow the flow.

        Args:
            state: u at the first time.
            times: two or more, strictly increasing or decreasing; None: 0 and 1, and only the last is
                returned.

        Returns:
            u(1), or, with ``times``, u at all of them, the first included.

        Raises:
            ValueError: the state has no rows or is not of floating point; the times are not in order; the
                tolerances are below the dtype.
            NonFiniteError: the state is NaN or infinite, or becomes so.
            RuntimeError: ``max_steps`` were too few.
        """
        self._check(state)
        asked = self._times(state, times)
        shape = state.shape[1:]

        def flat_field(
            time: Tensor,  # [n]
            flat: Tensor,  # [n, d]
        ) -> Tensor:  # [n, d]
            slope = self.field(time, flat.reshape(-1, *shape))
            if slope.shape != (len(flat), *shape):
                raise ValueError(
                    f"Flow: field must return slopes of the states' shape {(len(flat), *shape)}, "
                    f"got {tuple(slope.shape)}"
                )
            return slope.reshape(flat.shape)

        record = self._solves is not None
        found, self.evaluations, known = solve(
            flat_field,
            state.reshape(len(state), -1),
            asked,
            self.rtol,
            self.atol,
            self.max_steps,
            record=record,
        )
        if self._solves is not None and known is not None:
            self._solves.append(known)
        states = found.reshape(len(state), len(asked), *shape)
        return states[:, -1] if times is None else states

    @contextmanager
    def recording(self) -> Iterator[list[Solve]]:
        """A context in which solves are recorded, for a :class:`Regularizer`; the list grows with each.

        >>> import torch
        >>> from optex.regularisers import Flow, GlobalRegularizer
        >>> flow = Flow(lambda t, u: -u)
        >>> with flow.recording() as solves:
        ...     ends = flow(torch.ones(1, 1))
        >>> GlobalRegularizer()(solves[0]).shape
        torch.Size([])
        """
        outer, self._solves = self._solves, []
        try:
            yield self._solves
        finally:
            self._solves = outer

    def extra_repr(self) -> str:
        return f"rtol={self.rtol:g}, atol={self.atol:g}, max_steps={self.max_steps}"

    def _check(self, state: Tensor) -> None:
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.dim() < 2 or not len(state):
            came = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else repr(state)[:60]
            raise ValueError(f"Flow: the state must be a floating-point tensor [n, ...], n above 0, got {came}")
        check_tolerances("Flow", self.rtol, self.atol, state.dtype)
        if not bool(state.isfinite().all()):
            raise NonFiniteError("Flow: the state to start from is NaN or infinite")

    def _times(
        self,
        state: Tensor,  # [n, ...]
        times: Tensor | None,  # [m]
    ) -> Tensor:  # [m]
        if times is None:
            return torch.tensor([0.0, 1.0], dtype=state.dtype, device=state.device)
        asked = torch.as_tensor(times, dtype=state.dtype, device=state.device)
        if asked.dim() != 1 or len(asked) < 2:
            raise ValueError(f"Flow: times must be a vector of two or more, got shape {tuple(asked.shape)}")
        apart = asked.diff()
        if not (bool((apart > 0).all()) or bool((apart < 0).all())):
            raise ValueError("Flow: times must be strictly increasing or strictly decreasing")
        return asked
