"""MeZO: SGD along random directions, in place, with two forward passes a direction and no backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from optex.checks import check_flag, check_integer, check_number
from optex.draws import generator_states, set_generator_states
from optex.optimizers.mezo.directions import (
    check_seed,
    direction,
    finite_loss,
    update_,
)

__all__ = ["MeZO"]

_OF_ALL: Final = ("epsilon", "queries", "exact", "log_length")
_STATE: Final = "mezo"


class MeZO(Optimizer):
    """Memory-efficient zeroth-order SGD: steps along random directions, in the memory of inference.

    A step draws a seed, and z ~ N(0, I) from it each time that z is needed (Algorithm 1; Definition 1 has the
    estimate, called SPSA)::

        s = (L(θ + εz) - L(θ - εz)) / (2ε)
        θ ← θ - lr (s z + weight_decay θ)

    with the mean over several directions where ``queries`` > 1. Nothing of the model's size is kept: no
    gradient, no z, no copy. A run can be repeated without data from its start and its log of (seed, scalars,
    rates): ``replay``.

    ``step`` takes a closure that returns the loss and does **not** backpropagate; it is called 2 · queries
    times, without a tape. All calls of a step draw the same dropout.

    Args:
        params: tensors, or groups with ``lr``, ``weight_decay`` and ``maximize`` of their own. The published
            code does not decay biases and norms; give these a group with ``weight_decay=0``.
        lr: about 1 / d of SGD's; the paper's for large models is 1e-7 to 1e-6.
        epsilon: ε, the distance at which the loss is probed, positive.
        weight_decay: not negative.
        queries: directions a step, n of the paper's n-SPSA; at least 1.
        exact: put the parameters back from a copy of the model's size. Without it they come back by the
            opposite shift, to within rounding: about 1e-7 in float32, but too coarse in bfloat16, which needs
            ``exact``.
        log_length: most steps that the log holds, the last ones; None holds all, as ``replay`` needs.
        maximize: maximise instead.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a parameter is complex or an integer.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optimizer = optex.optimizers.MeZO([x], lr=0.05)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: x.square().sum())
    >>> bool(loss < 1e-3)
    True
    >>> start = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> optex.optimizers.MeZO([start], lr=0.05).replay(optimizer.log)
    >>> torch.equal(start, x)
    True

    Source: Malladi et al., NeurIPS 2023, arXiv 2305.17333, Algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        *,
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
        queries: int = 1,
        exact: bool = False,
        log_length: int | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "epsilon": check_number("MeZO", "epsilon", epsilon, open_below=True),
            "weight_decay": weight_decay,
            "queries": check_integer("MeZO", "queries", queries),
            "exact": check_flag("MeZO", "exact", exact),
            "log_length": log_length if log_length is None else _length(log_length),
            "maximize": check_flag("MeZO", "maximize", maximize),
        }
        super().__init__(params, defaults)
        self.state[_STATE] = {"step": 0, "log": []}  # pyright: ignore[reportArgumentType]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the defaults for what it does not set.

        Raises:
            ValueError, TypeError: a setting is out of range, is one for all groups, or a parameter is no real
                floating-point tensor; no group was added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                check_number("MeZO", name, group[name])
            for name in _OF_ALL:
                if group[name] != self.defaults[name]:
                    raise ValueError(
                        f"MeZO: {name} is one for all groups, {self.defaults[name]!r}, and a group has "
                        f"{group[name]!r}; set it in the constructor"
                    )
            for p in group["params"]:
                if not p.is_floating_point():
                    raise TypeError(f"MeZO: parameters must be real floating-point tensors, got {p.dtype}")
        except BaseException:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does; the log is copied, so that two optimizers do not write into one.

        Raises:
            ValueError: it is not a state of MeZO.
        """
        if _STATE not in state_dict.get("state", {}):
            raise ValueError("MeZO: the saved state has no log; it was cut short, or is another optimizer's")
        super().load_state_dict(state_dict)
        saved = self.state[_STATE]  # pyright: ignore[reportArgumentType]
        self.state[_STATE] = {"step": saved["step"], "log": list(saved["log"])}  # pyright: ignore[reportArgumentType]

    @property
    def log(self) -> list[tuple[int, list[float], list[float]]]:
        """For every step its seed, the scalars s of its directions, and the rates of the groups."""
        return self.state[_STATE]["log"]  # pyright: ignore[reportArgumentType]

    @property
    def steps_taken(self) -> int:
        """Steps of this run, including those of a state that was loaded."""
        return self.state[_STATE]["step"]  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, seed: int | None = None
    ) -> Tensor:  # []
        """One step.

        Args:
            closure: returns the loss of this step's batch, the same batch at every call, without backward.
            seed: of the step; None draws it from torch's global generator.

        Returns:
            The mean of the losses at the shifted points, which is the loss to second order in ε; float64, CPU.

        Raises:
            TypeError: there is no closure, or it returns no loss.
            NonFiniteError: a loss is NaN or infinite. No step was taken: parameters are as before, to the bit
                with ``exact=True`` and to within rounding without; torch's generators are as before.
        """
        if closure is None:
            raise TypeError(
                "MeZO: step needs a closure that returns the loss, got None; the loss is evaluated at shifted "
                "parameters, and existing gradients are not used"
            )
        before = generator_states()
        try:
            seed = check_seed("MeZO", seed)
            losses = self._losses(closure, seed)
        except BaseException:
            set_generator_states(before)
            raise
        epsilon = self.param_groups[0]["epsilon"]
        scalars = [(plus - minus) / (2 * epsilon) for plus, minus in losses]
        self._take(seed, scalars, [float(group["lr"]) for group in self.param_groups])
        return torch.tensor(losses, dtype=torch.float64).mean()

    @torch.no_grad()
    def replay(self, log: Iterable[tuple[int, list[float], list[float]]]) -> None:
        """Take the steps of a log, that of another run or of a ``BlockStreamer``, without a closure.

        Started where that run started, with the same settings, this ends where it ended, to the bit on the same
        kind of device; the rates are those of the log.

        Raises:
            ValueError: the log has another number of groups.
        """
        for seed, scalars, rates in log:
            if len(rates) != len(self.param_groups):
                raise ValueError(
                    f"MeZO: the log has rates for {len(rates)} groups, and there are {len(self.param_groups)}; "
                    "build the optimizer with the groups that wrote it"
                )
            if not self.param_groups[0]["exact"]:  # the same rounding as in the run
                for query in range(len(scalars)):
                    for shift in (1, -2, 1):
                        self._shift(seed, query, shift)
            self._take(seed, scalars, rates)

    def _placed(self) -> Iterable[tuple[int, dict[str, Any], Tensor]]:
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield place, group, p
                place += 1

    def _shift(self, seed: int, query: int, times: float) -> None:
        length = times * self.param_groups[0]["epsilon"]
        if length:
            for place, _, p in self._placed():
                p.add_(direction(seed, query, place, p), alpha=length)

    def _losses(self, closure: Callable[[], Any], seed: int) -> list[tuple[float, float]]:
        """The losses of every query, ahead and behind; the parameters are put back."""
        settings = self.param_groups[0]
        kept = [p.clone() for _, _, p in self._placed()] if settings["exact"] else None
        state = "parameters are as before" + (", to within rounding" if kept is None else "")
        draws, found = generator_states(), []
        for query in range(settings["queries"]):
            shifted, pair = 0.0, []
            try:
                for side, name in ((1.0, "ahead"), (-1.0, "behind")):
                    # Without a copy, a shift that an interrupt leaves half done cannot be undone.
                    self._shift(seed, query, side - shifted)
                    shifted = side
                    set_generator_states(draws)
                    pair.append(
                        finite_loss(
                            "MeZO",
                            closure(),
                            f"{name} along direction {query}",
                            f"{state}. Check the batch, or lower the rate or epsilon",
                        )
                    )
            finally:
                if kept is None:
                    self._shift(seed, query, -shifted)
                else:
                    for (_, _, p), value in zip(self._placed(), kept, strict=True):
                        p.copy_(value)
            found.append((pair[0], pair[1]))
        return found

    def _take(self, seed: int, scalars: list[float], rates: list[float]) -> None:
        signed = {
            id(group): -rate if group["maximize"] else rate
            for group, rate in zip(self.param_groups, rates, strict=True)
        }
        for place, group, p in self._placed():
            rate = signed[id(group)]
            # Decay pulls to 0 also where the loss is maximised.
            decay = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
            update_(p, place, seed, scalars, rate, decay)
        self.log.append((seed, scalars, rates))
        length = self.param_groups[0]["log_length"]
        if length is not None:
            del self.log[: max(0, len(self.log) - length)]
        self.state[_STATE]["step"] += 1  # pyright: ignore[reportArgumentType]


def _length(value: Any) -> int:
    return check_integer("MeZO", "log_length", value, least=0)
