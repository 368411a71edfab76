"""``reweight_sources``: weights for the sources of training data, by ScaleBiO.

Pan et al.: *ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting*, ACL 2025, arXiv 2406.19976; its
layers: *LISA*, NeurIPS 2024, arXiv 2403.17919.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_number, check_positive, shown
from optex.errors import NonFiniteError, WorkerLostError
from optex.evaluators import Evaluator, SequentialEvaluator, VectorizedEvaluator, WorkersEvaluator
from optex.minimizers.arguments import check_disp
from optex.optimizer import OptEx
from optex.sources import LayerSampler, MinimaxPenaltySource, SourceWeights
from optex.stepping import OPTIMIZERS, check_name

__all__ = ["reweight_sources"]

_OWNER = "reweight_sources"
Rows = Tensor | tuple[Tensor, ...]


def reweight_sources(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    sources: Mapping[str, Any] | Sequence[Any],
    validation: Any,
    *,
    alpha: float = 10.0,
    tau: float = 1.0,
    outer: int = 1,
    batches: int = 1000,
    lr: float = 1e-5,
    lr_weights: float = 1e-2,
    weight_decay: float = 5e-4,
    optimizer: str | Callable[..., Optimizer] = "adamw",
    batch_size: int | None = 64,
    layers: LayerSampler | None = None,
    seed: int = 0,
    parallelism: int = 4,
    stride: float | Literal["auto"] = 1,
    evaluator: Evaluator | None = None,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    callback: Callable[..., Any] | None = None,
    disp: bool = False,
) -> OptimizeResult:
    """Find the weights of K data sources whose mixture trains the network that validates best.

    Solves min_p L1(w*(p)), w*(p) = argmin_w Σ_k q_k l_k(w), q = softmax(p), by the minimax penalty of
    :class:`~optex.MinimaxPenaltySource`: w, u and p are stepped together, from q = 1 / K and two copies of
    ``model``. Outer iteration i = 0, 1, ... has the penalty α τ^i and all learning rates over τ^i.

    Args:
        model: the network to start from, pretrained say; it is left as it is.
        loss: ``loss(network, rows)`` returns one loss for each of the n rows, [n].
        sources: K sources by name, or in a list: each a tensor of rows [n_k, ...], or a tuple of such tensors.
        validation: rows of the same kind, of the data on which the network is to do well.
        alpha: α, positive: the hypergradient's bias is of the order of 1 / α.
        tau: τ, at least 1.
        outer: outer iterations, at least 1.
        batches: batches in each of them, one a gradient, at least 1.
        lr: of w and u. The default suits the fine-tuning of a pretrained language model by AdamW; a network
            from scratch needs one of the order that trains it.
        lr_weights: of p.
        weight_decay: of w and u.
        optimizer: a name of ``optex list``, or a function of parameter groups.
        batch_size: rows of the validation data in a batch, and of all sources together, in equal shares. None
            takes all rows each time: gradients are then exact.
        layers: trains few blocks of layers at a time; None trains all.
        seed: of the order of rows.
        parallelism, evaluator, workers: of :class:`~optex.OptEx`, as in :func:`~optex.minimize`.
        stride: of :class:`~optex.OptEx`. 1 takes a step for each gradient; "auto" may take more, but not with
            ``layers``.
        callback: after every round ``callback(intermediate_result)`` if that is its parameter's name, with the
            result that stopping now would give, which costs a pass over the validation rows; else
            ``callback(x)``. It stops the run by raising ``StopIteration`` or by returning True.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x`` [K], the weights, and ``weights``, by name; ``model``, w, which
        has seen the validation rows, and ``rival``, u, trained on the mixture alone; ``fun``, u's mean loss on
        the validation rows, and ``model_fun``, w's; ``penalty``, Φ at the last round's start; ``path`` [nit +
        1, K], the weights after each round; ``alpha``, the last; ``nit`` (rounds), ``nstep`` (steps), ``njev``
        (gradients of Φ, three of losses each; a step that its round did not keep has more than one),
        ``success``, ``status``, ``message``. Status 0: all batches were used; 2: numbers that are not finite,
        and all is as before that round; 3: workers no longer answer; 99: stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.

    Source: Pan et al., arXiv 2406.19976; the defaults are those of its released GPT-2 run.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> x, slope = torch.randn(3, 200, 5), torch.randn(5)
    >>> y = x @ slope
    >>> y[1] = torch.randn(200)                                     # this source is noise
    >>> result = optex.reweight_sources(
    ...     torch.nn.Linear(5, 1),
    ...     lambda network, rows: (network(rows[0])[:, 0] - rows[1]).square(),
    ...     {"clean": (x[0], y[0]), "noise": (x[1], y[1])}, (x[2], y[2]),
    ...     lr=0.05, lr_weights=0.1, batches=100,
    ... )
    >>> result.success, result.weights["clean"] > 0.95
    (True, True)
    """
    settings = _Settings(alpha, tau, outer, batches, stride, layers)
    mixture = _Mixture(_read_sources(sources), _read_rows("validation", validation), batch_size, seed)
    if not callable(loss):
        raise TypeError(f"{_OWNER}: loss must be a function of (network, rows), got {type(loss).__name__}")
    check_disp(_OWNER, disp)
    check_callable(_OWNER, "callback", callback, optional=True)
    losses, network = _Losses(loss), copy.deepcopy(model)
    source = MinimaxPenaltySource(
        losses.validation,
        losses.training,
        SourceWeights(mixture.names),
        network,
        alpha=settings.alpha,
        layers=layers,
        deterministic=batch_size is None and layers is None,
    )
    groups = source.param_groups(lr, lr_weights, weight_decay)
    base = _base(optimizer, groups)
    run = _Run(source, base, mixture, settings, losses, Callback(callback))
    chosen = _evaluator(evaluator, workers)
    try:
        result = run.until(check_integer(_OWNER, "parallelism", parallelism), chosen)
    finally:
        if isinstance(chosen, WorkersEvaluator) and chosen is not evaluator:
            chosen.close()
    if disp:
        shares = ", ".join(f"{name} {weight:.3g}" for name, weight in result.weights.items())
        print(f"{result.message}\n         Weights: {shares}\n         Validation loss: {result.fun:.6g}")
        print(f"         Iterations: {result.nit}\n         Gradients: {result.njev}")
    return result


class _Settings:
    """The constants of a run, checked."""

    def __init__(self, alpha: Any, tau: Any, outer: Any, batches: Any, stride: Any, layers: Any) -> None:
        self.alpha = check_positive(
            _OWNER, "alpha", alpha, "the hypergradient's bias is of the order of 1 / alpha: try 10"
        )
        self.tau = check_number(_OWNER, "tau", tau, least=1.0)
        self.outer = check_integer(_OWNER, "outer", outer)
        self.batches = check_integer(_OWNER, "batches", batches)
        self.stride = stride
        if layers is not None and stride != 1:
            raise ValueError(
                f"{_OWNER}: stride must be 1 with layers, "
                f"got {shown(stride)}: a step on predictions alone knows no "
                "draw of layers"
            )


# ---------------------------------------------------------------------- data


class _Batch(NamedTuple):
    rows: Rows  # of all sources
    places: Tensor  # [n], their sources
    held: Rows  # of validation


@dataclass(frozen=True)
class _Losses:
    """The caller's loss, in the forms that the source asks for."""

    loss: Callable[[nn.Module, Any], Tensor]

    def validation(self, network: nn.Module, batch: _Batch) -> Tensor:  # []
        return self.samples(network, batch.held).mean()

    def training(self, network: nn.Module, batch: _Batch) -> tuple[Tensor, Tensor]:  # [n], [n]
        return self.samples(network, batch.rows), batch.places

    def samples(self, network: nn.Module, rows: Rows) -> Tensor:  # [n]
        """One loss a row.

        Raises:
            TypeError, ValueError: the caller's function returns something else.
        """
        losses = self.loss(network, rows)
        came = type(losses).__name__ if not isinstance(losses, Tensor) else f"shape {tuple(losses.shape)}"
        if not isinstance(losses, Tensor):
            raise TypeError(f"{_OWNER}: loss must return a tensor of losses, one a row, got {came}")
        if losses.shape != (_count(rows),):
            raise ValueError(
                f"{_OWNER}: loss must return one loss for each of {_count(rows)} rows, got {came}; use "
                "reduction='none', and the mean over what is within a row"
            )
        return losses


def _count(rows: Rows) -> int:
    return len(rows[0]) if isinstance(rows, tuple) else len(rows)


def _taken(rows: Rows, places: Tensor) -> Rows:
    return tuple(part[places] for part in rows) if isinstance(rows, tuple) else rows[places]


def _read_rows(name: str, rows: Any) -> Rows:
    parts = rows if isinstance(rows, tuple) else (rows,)
    if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        raise TypeError(
            f"{_OWNER}: {name} must be a tensor of rows, or a tuple of such, got {type(rows).__name__}; for "
            "other data write the two losses of a MinimaxPenaltySource"
        )
    counts = {len(part) for part in parts}
    if len(counts) > 1:
        raise ValueError(f"{_OWNER}: {name} has tensors of {' and '.join(map(str, sorted(counts)))} rows")
    if not counts.pop():
        raise ValueError(f"{_OWNER}: {name} is empty; leave it out, there is nothing to weigh")
    return rows


def _read_sources(sources: Any) -> dict[str, Rows]:
    if isinstance(sources, Tensor) or not isinstance(sources, Mapping | Sequence):
        raise TypeError(
            f"{_OWNER}: sources must be a dict or a list of sources' rows, got {type(sources).__name__}"
        )
    pairs = sources.items() if isinstance(sources, Mapping) else enumerate(sources)
    found = {str(name): _read_rows(f"source {str(name)!r}", rows) for name, rows in pairs}
    if len(found) < 2:
        raise ValueError(f"{_OWNER}: there must be at least 2 sources to weigh, got {len(found)}")
    kinds = {len(rows) if isinstance(rows, tuple) else 0 for rows in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"{_OWNER}: sources must all be tensors, or all tuples of as many tensors")
    return found


class _Mixture:
    """Batches without end, in which every source has as many rows, so that none is ever absent.

    Raises:
        ValueError: a batch has less than a row for each source.
    """

    def __init__(self, sources: dict[str, Rows], held: Rows, batch_size: int | None, seed: int) -> None:
        self.names, self._rows, self.held = list(sources), list(sources.values()), held
        self._seed = check_integer(_OWNER, "seed", seed, least=0)
        self.batch_size = batch_size
        if batch_size is not None:
            check_integer(_OWNER, "batch_size", batch_size, least=len(sources))

    def batches(self) -> Iterator[_Batch]:
        if self.batch_size is None:
            whole = _joined(self._rows, self.held)
            yield from itertools.repeat(whole)
        size = self.batch_size or 1
        share = size // len(self._rows)
        streams = [
            _shuffled(rows, min(count, _count(rows)), self._seed, place)
            for place, (rows, count) in enumerate([*((rows, share) for rows in self._rows), (self.held, size)])
        ]
        while True:
            *parts, held = (next(stream) for stream in streams)
            yield _joined(parts, held)


def _shuffled(rows: Rows, size: int, seed: int, stream: int) -> Iterator[Rows]:
    """Batches of ``size`` rows, epoch by epoch; the rest of an epoch is not used."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    generator, count = torch.Generator().manual_seed(int(state >> np.uint64(1))), _count(rows)
    while True:
        order = torch.randperm(count, generator=generator)
        for places in order[: count - count % size].split(size):
            yield _taken(rows, places)


def _joined(parts: Sequence[Rows], held: Rows) -> _Batch:
    places = torch.repeat_interleave(torch.tensor([_count(rows) for rows in parts]))
    if not isinstance(parts[0], tuple):
        return _Batch(torch.cat([part for part in parts if isinstance(part, Tensor)]), places, held)
    columns = zip(*(part for part in parts if isinstance(part, tuple)), strict=True)
    return _Batch(tuple(torch.cat(column) for column in columns), places, held)


# ---------------------------------------------------------------------- the run


class _Run:
    """Outer iterations, and the result at any time."""

    def __init__(
        self,
        source: MinimaxPenaltySource,
        base: Optimizer,
        mixture: _Mixture,
        settings: _Settings,
        losses: _Losses,
        callback: Callback,
    ) -> None:
        self._source, self._base, self._mixture = source, base, mixture
        self._settings, self._losses, self._callback = settings, losses, callback
        self._path = [source.weights().detach().double().cpu().numpy()]
        self._penalty, self._steps, self._gradients, self._alpha = float("nan"), 0, 0, settings.alpha

    def until(self, parallelism: int, evaluator: Evaluator) -> OptimizeResult:
        """All outer iterations, unless something ends the run."""
        settings, layers = self._settings, self._source.layers
        batches: Iterator[Any] = self._mixture.batches()
        batches = batches if layers is None else layers.numbered(batches)
        for number in range(settings.outer):
            self._alpha = settings.alpha * settings.tau**number
            # Gradients of another α are of another function: the history starts anew, the base goes on.
            optimizer = OptEx(
                self._base, parallelism=parallelism, stride=settings.stride, evaluator=evaluator, shard=False
            )
            ended = self._iteration(optimizer, itertools.islice(batches, settings.batches))
            if ended is not None:
                return ended
            for group in self._base.param_groups:
                group["lr"] /= settings.tau
        return self._result(0, "All batches were used.")

    def _iteration(self, optimizer: OptEx, batches: Iterator[Any]) -> OptimizeResult | None:
        source = self._source.at(self._alpha)
        try:
            for report in optimizer.rounds(batches, source):
                self._path.append(source.weights().detach().double().cpu().numpy())
                self._penalty = float(report.loss)
                self._steps += report.accepted
                self._gradients += report.evaluated
                if stopped := self._callback.stops(lambda: self._result(99, "The run has not ended.")):
                    return self._result(99, stopped)
        except NonFiniteError as error:
            return self._result(2, str(error))
        except WorkerLostError as error:
            return self._result(3, str(error))
        return None

    def _result(self, status: int, message: str) -> OptimizeResult:
        source = self._source
        return OptimizeResult(
            x=self._path[-1],
            weights=source.weights.by_name(),
            model=source.model,
            rival=source.rival,
            fun=self._validated(source.rival),
            model_fun=self._validated(source.model),
            penalty=self._penalty,
            path=np.stack(self._path),
            alpha=self._alpha,
            nit=len(self._path) - 1,
            nstep=self._steps,
            njev=self._gradients,
            success=status == 0,
            status=status,
            message=message,
        )

    @torch.no_grad()
    def _validated(self, network: nn.Module) -> float:
        """Mean loss on all validation rows, in evaluation mode."""
        held = self._mixture.held
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            parts = torch.arange(_count(held)).split(self._mixture.batch_size or _count(held))
            sums = [float(self._losses.samples(network, _taken(held, part)).sum()) for part in parts]
        finally:
            for module, mode in modes:
                module.training = mode
        return sum(sums) / _count(held)


def _base(optimizer: Any, groups: list[dict[str, Any]]) -> Optimizer:
    if isinstance(optimizer, str):
        check_name(optimizer)
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"{_OWNER}: optimizer {optimizer!r} has to know the layers; it cannot step p, w and u"
            )
        optimizer = OPTIMIZERS[optimizer]
    if not callable(optimizer):
        raise TypeError(
            f"{_OWNER}: optimizer must be a name or a function of parameter groups, as torch.optim.AdamW, got "
            f"{type(optimizer).__name__}"
        )
    base = optimizer(groups)
    if not isinstance(base, Optimizer):
        raise TypeError(f"{_OWNER}: optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    return base


def _evaluator(evaluator: Any, workers: Any) -> Evaluator:
    if isinstance(evaluator, VectorizedEvaluator):
        raise ValueError(
            f"{_OWNER}: the joint field is no gradient of one function, which torch.func could compute; use "
            "evaluator=None, or workers="
        )
    if not (evaluator is None or isinstance(evaluator, Evaluator)):
        raise TypeError(
            f"{_OWNER}: evaluator must be an optex.evaluators.Evaluator or None, got {shown(evaluator)}"
        )
    if workers is None:
        return evaluator or SequentialEvaluator()
    if evaluator is not None:
        raise ValueError(f"{_OWNER}: evaluator and workers both say how gradients are computed; leave one out")
    return WorkersEvaluator(workers)
