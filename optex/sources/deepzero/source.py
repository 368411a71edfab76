"""The gradient one coordinate at a time, by differences of losses.

Chen, Zhang, Jia, Diffenderfer, Liu, Parasyris, Zhang, Zhang, Kailkhura, Liu, *DeepZero: Scaling up Zeroth-Order
Optimization for Deep Model Training*, ICLR 2024, arXiv 2310.02025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optex.checks import check_flag, check_integer, check_kind, check_number, check_parameters, shown
from optex.errors import NonFiniteError
from optex.sources.deepzero.mask import DynamicMask
from optex.sources.deepzero.passes import Chunk, Passes, chunks_of, first_non_finite
from optex.sources.deepzero.spread import Answer, alone, check_executor, over_executor, over_ranks
from optex.sources.interface import GradientSource

__all__ = ["CoordinateSource"]

_OWNER = "CoordinateSource"
_REMEDY = "parameters are as before. Check the batch, or lower mu or the rate"


class CoordinateSource(GradientSource):
    """A difference of losses for each active coordinate; no backward pass.

    For i in the active set S, and 0 elsewhere::

        ĝ_i = (L(θ + μ e_i) - L(θ)) / μ                    forward, the paper's
        ĝ_i = (L(θ + μ e_i) - L(θ - μ e_i)) / (2μ)         with central=True

    The error is ``μ H_ii / 2 + O(μ²)``, or ``O(μ²)``: a bias, no noise. In float32 the losses' rounding adds
    about 1e-7 L / μ. One gradient costs ``1 + |S|`` losses, or ``1 + 2|S|``. All losses of a call draw the
    same dropout and start from the same buffers; buffers and torch's generators end where one pass leaves them.

    Where the objective is a :class:`~optex.BlockLoss`, features are reused: a coordinate of block i costs the
    blocks from i on, and ``evaluations`` counts them so.

    Args:
        objective: the scalar loss of a batch at the parameters' present values; never differentiated.
        parameters: those that are optimised.
        mu: how far a coordinate is shifted, positive; 5e-3 is the authors'.
        central: differences to both sides.
        mask: which coordinates are active: a :class:`~optex.DynamicMask`, or a tensor of booleans for each
            parameter. None is all.
        vectorized: ``chunk`` losses at once, by ``torch.vmap``. ``objective`` has to be a module that owns the
            parameters. Costs as many copies of one parameter at a time, and of activations.
        chunk: how many coordinates are evaluated at once, or sent together.
        reuse: enter a ``BlockLoss`` at the coordinate's block.
        deterministic: the loss does not depend on the batch, and draws nothing.
        executor: worker processes to share the coordinates with, such as a ``ProcessPoolExecutor``. Objective,
            parameters and batch are sent at every call.
        workers: the number of tasks that a call is split into for the executor.
        group: a process group of ``torch.distributed`` to share the coordinates with. All ranks ask at the same
            time, with the same parameters, batch and torch seed, and all get the whole gradient.

    The answer has the same bits on one process, on workers and on ranks, where their machines and numbers of
    threads are alike. A pickled copy of the source, as evaluators send it, has neither executor nor group.

    Raises:
        TypeError: the objective cannot be called, parameters are no floating-point tensors, ``vectorized`` was
            asked for of what is no module with these parameters, or executor, group or mask has another type.
        ValueError: mu is not positive, a count is below 1, or a mask does not fit; in a call, mu is lost in the
            rounding of a parameter.
        NonFiniteError: in a call, a loss is NaN or infinite; parameters and gradients are as before.
        WorkerLostError, RuntimeError: in a call, a worker died, another rank failed, or ranks differ.

    >>> import torch, optex
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    >>> source = optex.CoordinateSource(lambda _: x.square().sum(), [x])
    >>> loss, _ = source.gradient(None)
    >>> x.grad, source.evaluations               # 2 θ + μ
    (tensor([ 6.0050, -3.9950], dtype=torch.float64), 3.0)

    Source: Chen et al., ICLR 2024, arXiv 2310.02025, sections 3 to 5; mu from the authors' code.
    """

    def __init__(
        self,
        objective: Callable[[Any], Any],
        parameters: Iterable[Tensor],
        mu: float = 5e-3,
        *,
        central: bool = False,
        mask: DynamicMask | Sequence[Tensor] | None = None,
        vectorized: bool = False,
        chunk: int = 64,
        reuse: bool = True,
        deterministic: bool = False,
        executor: Executor | None = None,
        workers: int = 2,
        group: Any = None,
    ) -> None:
        if not callable(objective):
            raise TypeError(f"{_OWNER}: objective must be callable, got {type(objective).__name__}")
        self.parameters: list[Tensor] = check_parameters(_OWNER, parameters)
        self.mu: float = check_number(_OWNER, "mu", mu, open_below=True)
        self.central: bool = check_flag(_OWNER, "central", central)
        self.deterministic: bool = check_flag(_OWNER, "deterministic", deterministic)
        for name, flag in (("vectorized", vectorized), ("reuse", reuse)):
            check_flag(_OWNER, name, flag)
        self.chunk: int = check_integer(_OWNER, "chunk", chunk)
        self.workers: int = check_integer(_OWNER, "workers", workers)
        self.passes: Passes = Passes(
            objective, self.parameters, mu=self.mu, central=central, vectorized=vectorized, reuse=reuse
        )
        if not (mask is None or isinstance(mask, (DynamicMask, list, tuple))):
            raise TypeError(
                f"{_OWNER}: mask must be a DynamicMask, a list of tensors, one a parameter, or None, got "
                f"{shown(mask)}"
            )
        self.mask: DynamicMask | list[Tensor] | None = (
            mask if mask is None or isinstance(mask, DynamicMask) else list(mask)
        )
        _check_mask(self.mask, self.parameters)
        check_executor(executor)
        _check_group(group, executor)
        self.executor: Executor | None = executor
        self.group: Any = group
        self.module: nn.Module | None = objective if isinstance(objective, nn.Module) else None

    @property
    def evaluations(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whole passes that one gradient costs, a pass from a block on counted by its blocks."""
        if isinstance(self.mask, DynamicMask):
            counts = self.mask.counts
        else:
            counts = [len(part) for part in self.active()]
        shares = [self.passes.share(place) * count for place, count in enumerate(counts)]
        return 1.0 + len(self.passes.shifts) * sum(shares)

    def active(self) -> list[Tensor]:  # of [k], int64
        """The active coordinates of each parameter, ascending, into the parameter as one row."""
        if isinstance(self.mask, DynamicMask):
            return self.mask.active()
        if self.mask is None:
            return [torch.arange(p.numel()) for p in self.parameters]
        return [part.flatten().nonzero().flatten().cpu() for part in self.mask]

    @torch.no_grad()
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        chunks = list(chunks_of(self.active(), self.chunk))
        steps = [self.passes.differences(chunk) for chunk in chunks]  # each [sides, c]
        base, losses = self._losses(batch, chunks)
        if not bool(base.loss.isfinite()):
            raise NonFiniteError(f"{_OWNER}: the loss is {float(base.loss)} at the parameters; {_REMEDY}")
        wrong = first_non_finite(losses, chunks, self.passes.shifts)
        if wrong is not None:
            raise NonFiniteError(f"{_OWNER}: {wrong}; {_REMEDY}")
        rows = [torch.zeros(p.numel(), dtype=torch.float64) for p in self.parameters]
        for chunk, values, aside in zip(chunks, losses, steps, strict=True):
            if self.central:
                slopes = (values[0] - values[1]) / (aside[0] - aside[1])
            else:
                slopes = (values[0] - base.loss) / aside[0]
            rows[chunk.place][chunk.indices] = slopes
        for p, row in zip(self.parameters, rows, strict=True):
            p.grad = row.view(p.shape).to(p.device, p.dtype)
        first = self.parameters[0]
        return base.loss.to(first.device, first.dtype), None

    def _losses(self, batch: Any, chunks: list[Chunk]) -> Answer:
        if self.group is not None:
            return over_ranks(self.group, self.passes, batch, chunks)
        if self.executor is not None:
            return over_executor(self.executor, self.workers, self.passes, batch, chunks)
        return alone(self.passes, batch, chunks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "executor": None, "group": None}


def _check_mask(mask: DynamicMask | Sequence[Any] | None, parameters: Sequence[Tensor]) -> None:
    if mask is None:
        return
    shapes = [tuple(p.shape) for p in parameters]
    if isinstance(mask, DynamicMask):
        came = mask.shapes
    else:
        for part in mask:
            if not isinstance(part, Tensor) or part.dtype is not torch.bool:
                kind = f"a tensor of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"{_OWNER}: mask must be tensors of torch.bool, or a DynamicMask, got {kind}")
        came = [tuple(part.shape) for part in mask]
    if came != shapes:
        raise ValueError(f"{_OWNER}: mask must have the parameters' shapes, {shapes}, got {came}")
    if not isinstance(mask, DynamicMask) and not any(bool(part.any()) for part in mask):
        raise ValueError(f"{_OWNER}: mask leaves no coordinate active; there is nothing to estimate")


def _check_group(group: Any, executor: Executor | None) -> None:
    if group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{_OWNER}: group is given, and torch.distributed has no process group; call init_process_group "
            "first"
        )
    check_kind(_OWNER, "group", group, dist.ProcessGroup, "a torch.distributed process group, dist.group.WORLD")
    if executor is not None:
        raise ValueError(f"{_OWNER}: executor and group are both given; spread coordinates over one of them")
