"""``federated_minimize``: clients that take local steps, and send sketches of their updates.

Song, Wang, Yu, Zhang: *Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel and
Vulnerability*, ICML 2023, arXiv 2210.08371.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_kind, check_number, check_positive
from optex.errors import NonFiniteError, WorkerLostError
from optex.evaluators import EvaluationRequest, Evaluator, SequentialEvaluator, WorkersEvaluator
from optex.evaluators.randomness import RandomDraws, seeded_states
from optex.minimizers.arguments import check_disp
from optex.sources import GaussianMechanism, GradientSource, Sketch
from optex.sources.functions import Jac, Point, PointForm, check_function, function_source, read_start
from optex.stepping import ParameterVector

__all__ = ["federated_minimize"]

_OWNER = "federated_minimize"
_LOCAL, _NOISE = 0, 1  # what a client's random numbers are for


def federated_minimize(
    fun: Callable[..., Any],
    x0: Any,
    clients: Sequence[Any],
    *,
    lr: float,
    jac: Jac = None,
    sketch: Sketch | None = None,
    local_steps: int = 1,
    server_lr: float | None = None,
    sample: Callable[[Any, torch.Generator], Any] | None = None,
    privacy: GaussianMechanism | None = None,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    seed: int = 0,
    first_round: int = 0,
    callback: Callable[..., Any] | None = None,
    maxiter: int = 100,
    gtol: float = 1e-5,
    disp: bool = False,
) -> OptimizeResult:
    """Minimise the mean over clients of ``fun(x, data)``, by rounds of local steps and sketched messages.

    In round t every client c starts at u = w, takes K steps ``u ← u - lr ∇f_c(u)`` and sends ``R_t (u - w)``, s
    numbers. The server sends their mean back to all, and all have

        w ← w + server_lr · R_tᵀ mean_c R_t (u_c - w)

    R_t is a function of the sketch's seed and of t, and is not sent. Without a sketch it is FedAvg. The number
    of rounds grows about as the messages shrink: **a sketch saves bytes a round, not bytes in total**. All
    clients take part in every round.

    Args:
        fun: f; ``fun(x, data)`` of a point and of one client's data returns a torch scalar, unless ``jac`` says
            otherwise. It may draw from torch's global generator.
        x0: where to start: an array of one dimension, or a tensor of any shape.
        clients: the data of each, in whatever form ``fun`` takes; all have the same weight.
        lr: of a local step, positive. With ``server_lr=None`` begin with the best one without a sketch, and try
            larger ones if differences between batches or clients are what keeps that one small.
        jac: as in :func:`~optex.minimize`: None (autograd), True (fun returns f and gradient), a function.
        sketch: R. None sends vectors as they are.
        local_steps: K, at least 1. With clients that differ, K > 1 has another limit than the minimum.
        server_lr: positive; None is ``1 / sketch.second_moment(d)``, the paper's factor of the dimension, with
            which the noise of the sketch cannot make descent diverge; 1 without a sketch.
        sample: ``sample(data, generator)`` returns the part of a client's data for one local step; None is all.
        privacy: clips what each client sends, and adds noise to it, before the sketch. Noise comes from
            ``seed``: this is a simulation; on real clients it has to come from a secret.
        workers: evaluate the clients of a round at once, as in :func:`~optex.minimize`: a number of processes
            (-1: one per core), a ``concurrent.futures.Executor``, or a function like ``map``. The run does not
            depend on it. A client that gets no answer through at the second try either misses the round.
        seed: of samples, of noise and of what ``fun`` draws: a function of (seed, round, client).
        first_round: t to begin with. A run stopped after n rounds goes on, to the bit, from its ``x`` with
            ``first_round=n``.
        callback: after every round ``callback(intermediate_result)`` if that is its parameter's name, else
            ``callback(x)``. It stops the run by raising ``StopIteration`` or returning True.
        maxiter: most rounds, at least 1.
        gtol: stop where ``‖mean message‖ / (lr K)``, about the length of the mean gradient, is at most this.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x``; ``fun`` and ``jac``, mean of all clients there, on all data;
        ``losses``, before each round, on the first sample; ``uploaded`` and ``downloaded``, bytes of one
        client's messages in this call; ``rho``, the zero-concentrated privacy spent since round 0 (None without
        ``privacy``, whose ``epsilon`` converts rounds to ε); ``nit``, ``nlost`` (answers that did not come),
        ``success``, ``status``, ``message``. Status 0: within gtol; 1: maxiter reached; 2: numbers that are not
        finite, and ``x`` is as before that round; 3: workers no longer answer; 99: stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work, or ``fun`` answers in a wrong form.

    Memory: 2 · clients · d numbers.

    Source: Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371.

    >>> import numpy as np, optex
    >>> centres = [np.full(64, c) for c in (0.0, 1.0, 5.0)]
    >>> def fun(x, centre):
    ...     return 0.5 * ((x - centre) ** 2).sum(), x - centre
    >>> result = optex.federated_minimize(
    ...     fun, np.zeros(64), centres, jac=True, lr=0.5, local_steps=2, sketch=optex.Sketch("srht", 16),
    ...     maxiter=200,
    ... )
    >>> result.success, result.x.round(3)[:3], result.uploaded // result.nit     # 16 numbers of 8 bytes a round
    (True, array([2., 2., 2.]), 128)
    """
    check_function(fun, jac)
    steps = check_integer(_OWNER, "maxiter", maxiter)
    form, start = read_start(x0)
    settings = _Settings.of(start.numel(), clients, lr, local_steps, server_lr, sketch, privacy, sample)
    settings.seed = check_integer(_OWNER, "seed", seed, least=0)
    first = check_integer(_OWNER, "first_round", first_round, least=0)
    gtol = check_number(_OWNER, "gtol", gtol)
    check_disp(_OWNER, disp)
    check_callable(_OWNER, "callback", callback, optional=True)
    alone = workers is None or (workers == 1 and not isinstance(workers, bool))
    evaluator: Evaluator = SequentialEvaluator() if alone else WorkersEvaluator(workers)
    source = _Client(fun, jac, Point(start), form, settings)
    try:
        result = _Federation(source, evaluator, first).until(steps, gtol, Callback(callback))
    finally:
        if isinstance(evaluator, WorkersEvaluator):
            evaluator.close()
    if disp:
        print(
            f"{result.message}\n         Function value: {result.fun:.6g}\n         Rounds: {result.nit}\n"
            f"         Bytes sent by a client: {result.uploaded}, received: {result.downloaded}"
        )
    return result


@dataclass
class _Settings:
    """The constants of a run, checked."""

    clients: list[Any]
    lr: float
    local_steps: int
    server_lr: float
    sketch: Sketch | None
    privacy: GaussianMechanism | None
    sample: Callable[[Any, torch.Generator], Any] | None
    seed: int = 0

    @classmethod
    def of(
        cls,
        dimension: int,
        clients: Any,
        lr: Any,
        local_steps: Any,
        server_lr: Any,
        sketch: Any,
        privacy: Any,
        sample: Any,
    ) -> _Settings:
        try:
            data = list(clients)
        except TypeError as error:
            raise TypeError(
                f"{_OWNER}: clients must be a sequence, the data of each, got {type(clients).__name__}"
            ) from error
        if not data:
            raise ValueError(f"{_OWNER}: there are no clients; pass the data of one at least")
        check_kind(_OWNER, "sketch", sketch, Sketch, "a Sketch or None")
        check_kind(_OWNER, "privacy", privacy, GaussianMechanism, "a GaussianMechanism or None")
        if not (sample is None or callable(sample)):
            raise TypeError(f"{_OWNER}: sample must be callable or None, got {type(sample).__name__}")
        longest = 1.0 if sketch is None else 1 / sketch.second_moment(dimension)
        rate = longest if server_lr is None else check_positive(_OWNER, "server_lr", server_lr)
        local = check_integer(_OWNER, "local_steps", local_steps)
        return cls(data, check_positive(_OWNER, "lr", lr), local, rate, sketch, privacy, sample)

    def generator(self, number: int, client: int, purpose: int) -> torch.Generator:
        """A client's random numbers in a round."""
        words = np.random.SeedSequence([self.seed, number, client, purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


@dataclass(frozen=True)
class _Client(GradientSource):
    """w - u of one client in one round as the gradient at w, so that any evaluator can run clients.

    The batch is (client, round); round None asks for value and gradient on all of the client's data.
    """

    fun: Callable[..., Any]
    jac: Jac
    point: Point
    form: PointForm
    settings: _Settings

    def gradient(self, batch: tuple[int, int | None]) -> tuple[Tensor, Tensor | None]:
        client, number = batch
        settings, data = self.settings, self.settings.clients[client]
        w = self.point.x.detach()
        local = Point(w.clone())
        if number is None:
            value = self._evaluate(local, data)
            self.point.x.grad = local.x.grad
            return value, None
        generator, values = settings.generator(number, client, _LOCAL), []
        for _ in range(settings.local_steps):
            drawn = data if settings.sample is None else settings.sample(data, generator)
            values.append(self._evaluate(local, drawn))
            with torch.no_grad():
                assert local.x.grad is not None
                local.x.sub_(local.x.grad, alpha=settings.lr)
        self.point.x.grad = w - local.x.detach()
        return values[0], None

    def _evaluate(self, local: Point, data: Any) -> Tensor:  # []
        source = function_source(self.fun, self.jac, (data,), local, self.form, vectorized=False)
        return source.gradient(None)[0].detach()

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        point = Point(self.point.x.detach().clone())
        return _Client(self.fun, self.jac, point, self.form, self.settings), [point.x]


class _Federation:
    """The server's rounds, and what they have counted."""

    def __init__(self, source: _Client, evaluator: Evaluator, first_round: int) -> None:
        self._source, self._evaluator, self._settings = source, evaluator, source.settings
        self._vector = ParameterVector([source.point.x])
        self._first = self._number = first_round
        self._losses: list[float] = []
        self._lost = self._uploaded = self._downloaded = 0
        self._slope = math.inf

    def until(self, maxiter: int, gtol: float, callback: Callback) -> OptimizeResult:
        """Rounds until the messages are within gtol, the callback stops them or ``maxiter`` is reached."""
        while True:
            try:
                self._round()
            except NonFiniteError as error:
                return self._ended(2, str(error))
            except WorkerLostError as error:
                return self._ended(3, str(error))
            if stopped := callback.stops(self._unfinished):
                return self._ended(99, stopped)
            if self._slope <= gtol:
                return self._ended(0, "Optimization terminated successfully: the mean message is within gtol.")
            if self._number - self._first == maxiter:
                return self._ended(1, "Maximum number of iterations has been exceeded.")

    @torch.no_grad()
    def _round(self) -> None:
        settings, number = self._settings, self._number
        losses, gaps, present = self._asked(number)
        updates = -gaps  # [n, d], of u - w
        broken = (~updates.isfinite().all(1) | ~losses.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise NonFiniteError(
                f"{_OWNER}: in round {number} client {present[broken[0]]} has a loss or a gradient that is not "
                "finite; x is as before the round. Lower lr, or server_lr"
            )
        if settings.privacy is not None:
            noisy = [
                settings.privacy.release(update, settings.generator(number, client, _NOISE))
                for update, client in zip(updates, present, strict=True)
            ]
            updates = torch.stack(noisy)
        messages = updates if settings.sketch is None else settings.sketch.sk(updates, number)  # [n, s]
        mean = messages.mean(0)  # [s]
        back = mean
        if settings.sketch is not None:
            back = settings.sketch.desk(mean, updates.shape[1], number)
        x = self._source.point.x
        moved = x + settings.server_lr * back.view_as(x)
        if not bool(moved.isfinite().all()):
            raise NonFiniteError(f"{_OWNER}: round {number} would leave the finite numbers; lower server_lr")
        x.copy_(moved)
        self._losses.append(float(losses.double().mean()))
        self._uploaded += messages[0].nbytes
        self._downloaded += mean.nbytes
        self._slope = float(mean.norm()) / (settings.lr * settings.local_steps)
        self._number += 1

    def _asked(self, number: int | None) -> tuple[Tensor, Tensor, list[int]]:  # [n], [n, d], n clients
        """Losses and gradients of the clients that answer, and their numbers."""
        count = len(self._settings.clients)
        points = self._vector.read().repeat(count, 1)
        # An evaluation has seed 0, which no round has.
        seeds = [self._settings.seed, 0 if number is None else number + 1]
        draws = [RandomDraws(seeded_states([*seeds, client])) for client in range(count)]
        batches = [(client, number) for client in range(count)]
        evaluation = self._evaluator.evaluate(
            EvaluationRequest(self._source, self._vector, points, batches, draws)
        )
        self._lost += len(evaluation.lost)
        present = [client for client in range(count) if client not in evaluation.lost]
        return evaluation.losses[present], evaluation.gradients[present], present

    def _ended(self, status: int, message: str) -> OptimizeResult:
        value, slope = math.nan, None
        try:
            losses, gradients, _ = self._asked(None)
            value, slope = float(losses.double().mean()), gradients.mean(0)
        except WorkerLostError:
            status = status or 3
        return self._result(status, message, value, slope)

    def _unfinished(self) -> OptimizeResult:
        return self._result(1, "The run has not ended.", self._losses[-1], None)

    def _result(self, status: int, message: str, value: float, slope: Tensor | None) -> OptimizeResult:
        settings, form = self._settings, self._source.form
        return OptimizeResult(
            x=form.present(self._source.point.x),
            fun=value,
            jac=None if slope is None else form.present(slope),
            losses=list(self._losses),
            uploaded=self._uploaded,
            downloaded=self._downloaded,
            rho=None if settings.privacy is None else settings.privacy.rho(self._number),
            nit=self._number - self._first,
            nlost=self._lost,
            success=status == 0,
            status=status,
            message=message,
        )
