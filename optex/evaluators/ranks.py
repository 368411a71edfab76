"""Gradients at once across the ranks of a torch.distributed job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from optex.checks import saved_integer
from optex.distributed.ranks import Ranks, Traffic
from optex.distributed.sharding import ShardedVector
from optex.evaluators.buffers import buffers_refused
from optex.evaluators.interface import Evaluation, EvaluationRequest, Evaluator, with_hook
from optex.evaluators.randomness import RandomDraws, seeded_states
from optex.evaluators.sequential import SequentialEvaluator
from optex.stepping import ParameterVector

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DistributedEvaluator"]

_REMEDY: Final = "Points on several ranks cannot hand them on to each other"


class DistributedEvaluator(Evaluator):
    """Spread the proxies over the ranks of a job started with ``torchrun``; each rank evaluates its own.

    Every rank runs the same script with the same optimizer, the same ``batches`` in the same order and starts
    from the same parameters; each evaluates N / ranks of a round's proxies, and all take the same steps.

    How vectors lie in memory is chosen by ``OptEx(shard=...)``:

    **Split**: each rank keeps a slice of d / ranks numbers of the history, of the parameters and of the base
    optimizer's state, drafts and replays on it, and sums inner products with the others. One all-to-all makes a
    round's proxies whole, and another cuts their gradients into slices: with N = ranks each rank sends and
    receives ``2 · d · (1 - 1 / ranks)`` numbers a round, as much as one all-reduce of a gradient, whatever N
    and T0 are, beside about 3 N messages of T0 numbers. Between rounds the model's parameters are stale on
    every rank: ``optimizer.gather()`` brings them up to date, as the end of ``rounds`` does.

    **Replicated**: for base optimizers that do not step every coordinate by itself. Every rank keeps all state
    and does everything but the others' evaluations; each sends its gradients to all, about N · d numbers a
    round.

    **Beside data parallelism**: with a mesh of two dimensions, ``("proxies", "data")``, ranks along the second
    evaluate the same proxies, each on its part of the batch; gradients and losses are averaged, for no more
    bytes than above. Ranks at the same place along "data" are given the same parts. The model is not wrapped in
    ``DistributedDataParallel``.

    Random numbers: a step's draws (dropout) start from a seed of the step's own, so that they do not depend on
    which rank evaluates it. A model that draws none takes the same steps as with the ``SequentialEvaluator``;
    one that does draw gets other numbers than there. Buffers that an evaluation changes (BatchNorm's) are
    refused.

    Args:
        mesh: of one dimension ``("proxies",)``, or two; all ranks along "proxies" by default.
        local: how a rank evaluates its own proxies; ``SequentialEvaluator()`` by default. With N above the
            number of ranks a ``VectorizedEvaluator`` may be faster.
        seed: of the steps' random draws.

    Attributes:
        ranks: the process group and this rank's place in it; None until ``OptEx`` is built.
        traffic: bytes and messages so far; None until then.

    Memory of a rank in numbers, with R ranks, P of them along "proxies": split, ``2 · T0 · d / R`` for the
    history, at most ``5 · N · d / R`` for a round and the steps not kept yet, and ``2 / R`` of parameters and
    base state; for evaluation, beside the model and its gradients, one copy of it and at most ``4 · d`` for
    each of the N / P proxies in flight.

    Raises:
        RuntimeError: torch.distributed has no process group, the ranks are not in the same round with the same
            parameters, or another rank's objective failed.
        RankLostError: another rank died or did not answer within the process group's timeout.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        local: Evaluator | None = None,
        seed: int = 0,
    ) -> None:
        self.mesh: DeviceMesh | None = mesh
        self.local: Evaluator = local if local is not None else SequentialEvaluator()
        self.seed: int = seed
        self.ranks: Ranks | None = None
        self._drawn = 0  # steps that were given their random draws
        self._requests = 0

    @property
    def traffic(self) -> Traffic | None:
        return None if self.ranks is None else self.ranks.traffic

    def connect(self, parameters: Sequence[Tensor]) -> Ranks:
        if self.ranks is None:
            self.ranks = Ranks(self.mesh, parameters[0].device)
        sums = torch.stack([p.detach().sum(dtype=torch.float64).cpu() for p in parameters])
        for rank, there in enumerate(self.ranks.gather(sums)):
            if not torch.equal(there, sums):
                raise RuntimeError(
                    f"DistributedEvaluator: ranks {self.ranks.rank} and {rank} have different parameters; seed "
                    "them alike (torch.manual_seed) or broadcast the first rank's before OptEx is built"
                )
        return self.ranks

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            owner = "DistributedEvaluator.load_state_dict"
            self.seed, self._drawn = (saved_integer(owner, state, name) for name in ("seed", "drawn"))

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        ranks, vector, count = self.ranks, request.vector, len(request)
        if ranks is None:
            raise RuntimeError("DistributedEvaluator: hand it to OptEx(..., evaluator=...), which connects it")
        self._check_agreement(ranks, vector, request.points)
        self._pin(request.draws)
        shares = ranks.shares(count)
        start = sum(shares[: ranks.place[0]])
        mine = slice(start, start + shares[ranks.place[0]])
        here = request.rows(mine)
        split = isinstance(vector, ShardedVector)
        here = replace(
            here,
            vector=vector.whole,
            points=vector.space.deal(request.points) if split else here.points,
            draws=[drawn.apart(ranks.place[1]) for drawn in here.draws],
        )
        try:
            gradients, answer = self._evaluate_here(ranks, here, shares, mine, split=split)
        finally:
            if split:
                vector.note()  # the parameters were changed and put back
        gradients = vector.space.collect(gradients, count) if split else ranks.gather_shares(gradients, shares)
        losses = answer.losses.to(request.points.device, request.points.dtype)
        return replace(answer, losses=losses, gradients=gradients)

    def _evaluate_here(
        self, ranks: Ranks, request: EvaluationRequest, shares: Sequence[int], mine: slice, *, split: bool
    ) -> tuple[Tensor, Evaluation]:  # [m, d]
        """This rank's own gradients, and all ranks' losses, masks and lost points."""
        shared = (
            ranks.data > 1
        )  # the hook is for whole gradients, and each rank has that of a part of the batch
        found, error = self._attempt(replace(request, gradient_hook=None) if shared else request)
        answer = _exchange_headers(ranks, found, shares, len(request.vector.parameters), error)
        if not shared or (split and request.gradient_hook is None):  # collecting the slices averages
            return found.gradients, answer
        averaged = ranks.mean_over_data(found.gradients)
        return with_hook(request, Evaluation(found.losses, averaged, answer.masks[mine])).gradients, answer

    def _attempt(self, request: EvaluationRequest) -> tuple[Evaluation, Exception | None]:
        """This rank's own evaluation, and its error if it failed: the other ranks wait and have to be told."""
        nothing = Evaluation(request.points.new_empty(0), torch.zeros_like(request.points), ())
        if not len(request):
            return nothing, None
        before = [] if request.buffers is None else request.buffers.read()
        try:
            found = self.local.evaluate(request)
        except Exception as error:  # noqa: BLE001  (the user's function may raise anything)
            return nothing, error
        pairs = (pair for after in found.buffers or () for pair in zip(before, after, strict=True))
        if any(not torch.equal(*pair) for pair in pairs):
            return nothing, buffers_refused("DistributedEvaluator", "the model", _REMEDY)
        return found, None

    def _check_agreement(self, ranks: Ranks, vector: ParameterVector, points: Tensor) -> None:
        """Refuse ranks that are not in the same round of the same run: they would wait for each other."""
        split = isinstance(vector, ShardedVector)
        content = torch.zeros((), dtype=torch.float64) if split else points.sum(dtype=torch.float64).cpu()
        counts = torch.tensor([len(points), vector.dimension, self._requests], dtype=torch.float64)
        here = torch.cat([counts, content[None]])
        self._requests += 1
        for rank, there in enumerate(ranks.gather(here)):
            if not torch.equal(there.view(torch.int64), here.view(torch.int64)):  # NaN is equal to NaN here
                raise RuntimeError(
                    f"DistributedEvaluator: ranks {ranks.rank} and {rank} are not at the same place: proxies, "
                    f"dimension, rounds and the proxies' sum are {here.tolist()} and {there.tolist()}. They "
                    "all need the same optimizer and equally many batches; replicated ones also processors of "
                    "one kind, that round alike"
                )

    def _pin(self, draws: Sequence[RandomDraws]) -> None:
        """Give new steps the random numbers that they keep, the same on all ranks, without a message."""
        for drawn in draws:
            if drawn.state is None:
                drawn.state = seeded_states([self.seed, self._drawn])
                self._drawn += 1


def _exchange_headers(
    ranks: Ranks,
    found: Evaluation,
    shares: Sequence[int],
    parameters: int,
    error: Exception | None,
) -> Evaluation:
    """All points' losses, noise, masks and which were lost or retried, on all ranks; gradients are left out.

    Args:
        ranks: the process group.
        found: this rank's own evaluation of m points.
        shares: points of each place along "proxies".
        parameters: how many tensors a mask tells of.
        error: what this rank's evaluation failed with; None where it did not.

    Raises:
        RuntimeError: another rank's evaluation failed.
        Exception: ``error``, where there is one.
    """
    most, count = max(shares), len(found.losses)
    numbers = torch.full((2, most), torch.nan, dtype=torch.float64)  # losses, variances of the noise
    numbers[0, :count] = found.losses.to("cpu", torch.float64)
    if found.noise_variance is not None:
        numbers[1, :count] = found.noise_variance.to("cpu", torch.float64)
    flags = torch.zeros(most, 2 + parameters, dtype=torch.uint8)  # lost, retried, then which parameters
    flags[list(found.lost), 0] = 1
    flags[list(found.retried), 1] = 1
    if count:
        flags[:count, 2:] = torch.tensor(found.masks, dtype=torch.uint8)
    failed = torch.tensor([error is not None], dtype=torch.uint8)
    headers = ranks.gather(torch.cat([numbers.reshape(-1).view(torch.uint8), flags.reshape(-1), failed]))
    if any(header[-1] for header in headers):
        _raise_first(ranks, error)
    total = torch.zeros(len(ranks.places) // ranks.data, 2, most, dtype=torch.float64)
    fates = torch.zeros(len(total), most, 2 + parameters, dtype=torch.uint8)
    for (proxy, _), header in zip(ranks.places, headers, strict=True):
        total[proxy] += header[: 16 * most].clone().view(torch.float64).view(2, most)
        fates[proxy] |= header[16 * most : -1].view(most, -1)
    there = torch.cat([torch.arange(most) < share for share in shares])
    fates = fates.reshape(-1, 2 + parameters)[there].bool()
    lost, retried = (tuple(fates[:, column].nonzero()[:, 0].tolist()) for column in (0, 1))
    masks = tuple(tuple(row) for row in fates[:, 2:].tolist())
    losses, noise = (total[:, row].reshape(-1)[there] for row in (0, 1))
    # The mean of D gradients of parts of a batch has the mean of their variances, over D.
    noise = None if noise.isnan().all() else noise / ranks.data**2
    return Evaluation(losses / ranks.data, found.gradients[:0], masks, noise, retried=retried, lost=lost)


def _raise_first(ranks: Ranks, error: Exception | None) -> None:
    said = None if error is None else f"{type(error).__name__}: {error}"
    messages = ranks.gather_objects(said)
    if error is not None:
        raise error
    rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
    raise RuntimeError(f"DistributedEvaluator: evaluation failed on rank {rank}: {message}; see its traceback")
