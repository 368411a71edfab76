"""Gradients at once across the ranks of a torch.distributed job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.distributed.ranks import Ranks, Traffic
from optex.distributed.sharding import ShardedVector, ShardedWalk
from optex.evaluators.interface import Draws, Evaluation, Evaluator, GradientSource, run_hook
from optex.evaluators.sequential import SequentialEvaluator
from optex.stepping.bases import ELEMENTWISE
from optex.stepping.parameters import ParameterVector, Walk

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DistributedEvaluator"]


class DistributedEvaluator(Evaluator):
    """Spread the proxies over the ranks of a job started with ``torchrun``; each rank evaluates its own.

    Every rank runs the same script with the same optimizer, the same ``batches`` in the same order and starts
    from the same parameters; each evaluates N / ranks of a round's proxies, and all take the same steps.

    **Split** (``shard``): each rank keeps a slice of d / ranks numbers of the history, of the parameters and
    of the base optimizer's state, drafts and replays on it, and sums inner products with the others. A round's
    proxies are made whole by one all-to-all, and their gradients cut up by another: with N = ranks each rank
    sends and receives ``2 · d · (1 - 1 / ranks)`` numbers a round, as much as one all-reduce of a gradient,
    whatever N and T0 are, beside about 3 N messages of T0 numbers. Between rounds the model's parameters are
    those of before, on every rank: ``optimizer.gather()`` makes them whole, as the end of ``rounds`` does.

    **Replicated**: for base optimizers that do not step every coordinate by itself. Every rank keeps and does
    everything but the evaluations; each sends its gradients to all, about N · d numbers a round.

    **Beside data parallelism**: with a mesh of two dimensions, ``("proxies", "data")``, ranks along the second
    evaluate the same proxies, each on its part of the batch; gradients and losses are averaged, for no more
    bytes than above. Ranks of one place along "data" iterate the same parts. The model is not wrapped in
    ``DistributedDataParallel``.

    Random numbers: a step's draws (dropout) start from a seed of the step's own, so that they do not depend on
    which rank evaluates it; a model that draws none goes the way of the ``SequentialEvaluator``, one that does
    another way that is as good. Buffers that an evaluation changes (BatchNorm's) are refused.

    Args:
        mesh: of one dimension ``("proxies",)``, or two; all ranks along "proxies" by default.
        shard: whether to split; by default where the base optimizer is known to step every coordinate by
            itself (``optex.stepping.bases.ELEMENTWISE``) and has no step hooks, which would see slices.
        local: how a rank evaluates its own proxies; ``SequentialEvaluator()`` by default. With N above the
            number of ranks a ``VectorizedEvaluator`` may do better.
        seed: of the steps' random draws.

    Attributes:
        ranks: the process group and this rank's place in it, None before ``OptEx`` is built.
        traffic: bytes and messages so far, None before that, too.

    Memory of a rank in numbers, with R ranks, P of them along "proxies": split, ``2 · T0 · d / R`` for the
    history, at most ``5 · N · d / R`` for a round and the steps not kept yet, and ``2 / R`` of parameters and
    base state; for evaluation, beside the model and its gradients, one copy of it and at most ``4 · d`` for
    each of the N / P proxies in flight.

    Raises:
        RuntimeError: torch.distributed has no process group, the ranks are not at the same place, or another
            rank's objective failed.
        RankLostError: another rank died or did not answer within the process group's timeout.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        shard: bool | None = None,
        local: Evaluator | None = None,
        seed: int = 0,
    ) -> None:
        self.mesh = mesh
        self.shard = shard
        self.local = local if local is not None else SequentialEvaluator()
        self.seed = seed
        self.ranks: Ranks | None = None
        self._drawn = 0  # steps that were given their random draws
        self._rounds = 0
        self._checked: list[Tensor] | None = None  # parameters whose buffers were seen to stay

    @property
    def traffic(self) -> Traffic | None:
        return None if self.ranks is None else self.ranks.traffic

    def lay_out(self, base: Optimizer, parameters: Iterable[Tensor], scheduler: LRScheduler | None) -> Walk:
        parameters = list(parameters)
        if self.ranks is None:
            self.ranks = Ranks(self.mesh, parameters[0].device)
        self._check_start(self.ranks, parameters)
        if not self._shards(base):
            return super().lay_out(base, parameters, scheduler)
        return ShardedWalk(base, ShardedVector(parameters, self.ranks), scheduler)

    def _shards(self, base: Optimizer) -> bool:
        if self.shard is not None:
            return self.shard
        hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
        return type(base) in ELEMENTWISE and not hooks

    @staticmethod
    def _check_start(ranks: Ranks, parameters: Sequence[Tensor]) -> None:
        sums = torch.stack([p.detach().sum(dtype=torch.float64).cpu() for p in parameters])
        for rank, there in enumerate(ranks.gather(sums)):
            if not torch.equal(there, sums):
                raise RuntimeError(
                    f"DistributedEvaluator: ranks {ranks.rank} and {rank} have different parameters; seed them "
                    "alike (torch.manual_seed) or broadcast the first rank's before OptEx is built"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.seed, self._drawn = state["seed"], state["drawn"]

    def evaluate(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,
        batches: Sequence[Any],
        draws: Sequence[Draws],
    ) -> Evaluation:
        return self.evaluate_hooked(source, vector, points, batches, draws, None)

    def evaluate_hooked(
        self,
        source: GradientSource,
        vector: ParameterVector,
        points: Tensor,
        batches: Sequence[Any],
        draws: Sequence[Draws],
        hook: Callable[[], Any] | None,
    ) -> Evaluation:
        ranks = self.ranks
        if ranks is None:
            raise RuntimeError("DistributedEvaluator: hand it to OptEx(..., evaluator=...), which lays it out")
        self._check_agreement(ranks, vector, points)
        self._pin(draws)
        shares = ranks.shares(len(points))
        start = sum(shares[: ranks.place[0]])
        mine = slice(start, start + shares[ranks.place[0]])
        split = isinstance(vector, ShardedVector)
        rows = vector.space.deal(points) if split else points[mine]
        drawn = [_apart(d, ranks.place[1]) for d in draws[mine]]
        shared = ranks.data > 1  # then no rank alone has a gradient that the hook could change
        try:
            early = None if shared else hook
            found, error = self._attempt(source, vector.whole, rows, batches[mine], drawn, early)
            answer = _exchange_headers(ranks, found, shares, len(vector.whole.parameters), error)
            gradients = found.gradients
            if shared and (hook is not None or not split):
                gradients = ranks.mean_over_data(gradients)
            if shared and hook is not None:
                run_hook(hook, vector.whole, rows, Evaluation(found.losses, gradients, answer.present[mine]))
        finally:
            if split:
                vector.note()  # the parameters were changed and put back
        if split:
            gradients = vector.space.collect(gradients, len(points))
        else:
            gradients = ranks.gather_shares(gradients, shares)
        return replace(answer, losses=answer.losses.to(points.device, points.dtype), gradients=gradients)

    def _attempt(
        self,
        source: GradientSource,
        vector: ParameterVector,
        rows: Tensor,  # [m, d]
        batches: Sequence[Any],  # m
        draws: Sequence[Draws],  # m
        hook: Callable[[], Any] | None,
    ) -> tuple[Evaluation, Exception | None]:
        """This rank's own evaluations, or what went wrong: the others wait, and have to know."""
        nothing = Evaluation(rows.new_empty(0), torch.zeros_like(rows), ())
        if not len(rows):
            return nothing, None
        before = vector.read_buffers()
        try:
            found = self.local.evaluate_hooked(source, vector, rows, batches, draws, hook)
        except Exception as error:  # noqa: BLE001  (the user's function may raise anything)
            return nothing, error
        if found.buffers is not None and self._checked is not vector.parameters:
            pairs = (pair for after in found.buffers for pair in zip(before, after, strict=True))
            if any(not torch.equal(*pair) for pair in pairs):
                return nothing, ValueError(
                    "DistributedEvaluator: an evaluation changes the model's buffers (BatchNorm's running "
                    "statistics?), which points on several ranks cannot hand on to each other; use "
                    "torch.nn.GroupNorm, torch.func.replace_all_batch_norm_modules_(model) or eval()"
                )
            self._checked = vector.parameters
        return found, None

    def _check_agreement(self, ranks: Ranks, vector: ParameterVector, points: Tensor) -> None:
        """Refuse ranks that are not in the same round of the same run, before they wait for each other."""
        split = isinstance(vector, ShardedVector)
        content = torch.zeros((), dtype=torch.float64) if split else points.sum(dtype=torch.float64).cpu()
        counts = torch.tensor([len(points), vector.dimension, self._rounds], dtype=torch.float64)
        here = torch.cat([counts, content[None]])
        self._rounds += 1
        for rank, there in enumerate(ranks.gather(here)):
            if not torch.equal(there.view(torch.int64), here.view(torch.int64)):  # NaN is equal to NaN here
                raise RuntimeError(
                    f"DistributedEvaluator: ranks {ranks.rank} and {rank} are not at the same place: proxies, "
                    f"dimension, rounds and the proxies' sum are {here.tolist()} and {there.tolist()}. They "
                    "all need the same optimizer and equally many batches; replicated ones also processors of "
                    "one kind, that round alike"
                )

    def _pin(self, draws: Sequence[Draws]) -> None:
        """Give new steps the random numbers they keep, alike on all ranks, without asking."""
        for drawn in draws:
            if drawn.state is None:
                drawn.state = _states([self.seed, self._drawn])
                self._drawn += 1


def _states(entropy: Sequence[int]) -> list[Tensor]:
    """States of torch's generators, the CPU's and those of CUDA devices in use, from a seed in parts."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    generators = [torch.Generator(), *(torch.Generator(f"cuda:{i}") for i in range(devices))]
    return [generator.manual_seed(seed).get_state() for generator in generators]


def _apart(drawn: Draws, part: int) -> Draws:
    """A step's draws for one part of its batch: parts must not share their dropout."""
    if not part or drawn.state is None:
        return drawn
    generator = torch.Generator()
    generator.set_state(drawn.state[0])
    return Draws(_states([generator.initial_seed(), part]))


def _exchange_headers(
    ranks: Ranks,
    found: Evaluation,
    shares: Sequence[int],
    parameters: int,
    error: Exception | None,
) -> Evaluation:
    """All rows' losses, presence and fates on all ranks; gradients are left out.

    Raises:
        RuntimeError: a rank's evaluation failed; on that rank its own error.
    """
    most, count = max(shares), len(found.losses)
    losses = torch.full((most,), torch.nan, dtype=torch.float64)
    losses[:count] = found.losses.to("cpu", torch.float64)
    flags = torch.zeros(most, 2 + parameters, dtype=torch.uint8)  # lost, retried, then the parameters present
    flags[list(found.lost), 0] = 1
    flags[list(found.retried), 1] = 1
    if count:
        flags[:count, 2:] = torch.tensor(found.present, dtype=torch.uint8)
    failed = torch.tensor([error is not None], dtype=torch.uint8)
    headers = ranks.gather(torch.cat([losses.view(torch.uint8), flags.reshape(-1), failed]))
    if any(header[-1] for header in headers):
        _raise_first(ranks, error)
    total = torch.zeros(len(ranks.places) // ranks.data, most, dtype=torch.float64)
    fates = torch.zeros(*total.shape, 2 + parameters, dtype=torch.uint8)
    for (proxy, _), header in zip(ranks.places, headers, strict=True):
        total[proxy] += header[: 8 * most].clone().view(torch.float64)
        fates[proxy] |= header[8 * most : -1].view(most, -1)
    there = torch.cat([torch.arange(most) < share for share in shares])
    fates = fates.reshape(-1, 2 + parameters)[there].bool()
    lost, retried = (tuple(fates[:, column].nonzero()[:, 0].tolist()) for column in (0, 1))
    present = tuple(tuple(row) for row in fates[:, 2:].tolist())
    losses = (total / ranks.data).reshape(-1)[there]
    return Evaluation(losses, found.gradients[:0], present, retried=retried, lost=lost)


def _raise_first(ranks: Ranks, error: Exception | None) -> None:
    said = None if error is None else f"{type(error).__name__}: {error}"
    messages = ranks.gather_objects(said)
    if error is not None:
        raise error
    rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
    raise RuntimeError(f"DistributedEvaluator: evaluation failed on rank {rank}: {message}; see its traceback")
