"""Reports of rounds, each written to a logger before it is passed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from optex.round.report import RoundReport

__all__ = ["ReportStream", "streamed"]

_Write = Callable[[Mapping[str, float], int], Any]


def streamed(reports: Iterable[RoundReport], to: object, *, prefix: str = "optex/") -> ReportStream:
    """The reports, each written to a logger before it is passed on.

    Written are the numbers of ``RoundReport.as_dict``, at the step ``report.number``. Those that are not finite
    (a prediction's error where nothing is known yet) are left out, as loggers disagree on what to do with them.

    Args:
        reports: as from ``OptEx.rounds``; its ``len`` is the stream's, and ``close`` reaches it.
        to: where the numbers go, by the first of these methods that it has: ``add_scalar(tag, value, step)``
            (TensorBoard's ``SummaryWriter``), ``log_metrics(numbers, step=)`` (Lightning's loggers, mlflow),
            ``log(numbers)`` (a run of ``wandb``, which counts its own steps; ``number`` is among the numbers).
        prefix: before every name.

    Raises:
        TypeError: ``to`` has none of these methods.

    >>> import torch, optex
    >>> class Printer:
    ...     def log(self, numbers):
    ...         print(numbers["optex/number"], numbers["optex/accepted"])
    >>> parameter = torch.ones(2, requires_grad=True)
    >>> optimizer = optex.OptEx(torch.optim.SGD([parameter], lr=0.1), stride=1, parallelism=1)
    >>> rounds = optimizer.rounds(torch.ones(3, 2), lambda batch: (parameter * batch).sum())
    >>> [report.number for report in optex.streamed(rounds, to=Printer())]
    0 1
    1 1
    2 1
    [0, 1, 2]
    """
    return ReportStream(reports, _writer(to), prefix)


def _writer(to: object) -> _Write:
    """How the numbers of a round get to ``to``."""
    target: Any = to
    if callable(getattr(to, "add_scalar", None)):

        def add_scalars(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                target.add_scalar(name, value, step)

        return add_scalars
    if callable(getattr(to, "log_metrics", None)):
        return lambda numbers, step: target.log_metrics(dict(numbers), step=step)
    if callable(getattr(to, "log", None)):
        return lambda numbers, _: target.log(dict(numbers))
    raise TypeError(
        f"streamed: to: a {type(to).__name__} has none of add_scalar, log_metrics and log; hand over "
        "TensorBoard's SummaryWriter, a Lightning logger, a run of wandb, or an object with log(numbers)"
    )


class ReportStream(Iterator[RoundReport]):
    """What ``streamed`` answers: the reports, with the length that their source has.

    Args:
        reports: to pass on.
        write: takes the numbers of one, by name, and its number.
        prefix: before every name.
    """

    def __init__(self, reports: Iterable[RoundReport], write: _Write, prefix: str) -> None:
        self._source, self._reports = reports, iter(reports)
        self._write, self._prefix = write, prefix

    def __iter__(self) -> ReportStream:
        return self

    def __next__(self) -> RoundReport:
        report = next(self._reports)
        numbers = {
            f"{self._prefix}{name}": value for name, value in report.as_dict().items() if math.isfinite(value)
        }
        self._write(numbers, report.number)
        return report

    def __len__(self) -> int:
        if not isinstance(self._source, Sized):
            raise TypeError(
                f"streamed: reports are a {type(self._source).__name__}, which has no length; hand over what "
                "OptEx.rounds answers, or a list, where one is needed"
            )
        return len(self._source)

    def close(self) -> None:
        """Make no more rounds, where the source of the reports can be told so."""
        close = getattr(self._reports, "close", None)
        if close is not None:
            close()
