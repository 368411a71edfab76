"""Buffers that an evaluation would change and nobody could put in order again: one refusal for all evaluators.

BatchNorm in training mode moves its running statistics at every point it is evaluated at, whether that point's
step is kept or not. Points in turn can hand them on, where the model is known; points at once cannot. Who
notices
depends on what is known: the modules, if the model is at hand; versions of its tensors, in a worker's copy;
nothing but which modules are run, for a closure.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["buffers_refused", "refuse_running_statistics", "statistics_watched"]


def buffers_refused(who: str, what: str, remedy: str) -> ValueError:
    """The error for a model that updates buffers where they cannot be looked after.

    Args:
        who: the evaluator.
        what: updates them.
        remedy: what this evaluator's user may do beside what helps everywhere.
    """
    return ValueError(
        f"{who}: {what} updates buffers (BatchNorm's running statistics?) at every point evaluated, not at the "
        f"steps taken. {remedy}; or use torch.nn.GroupNorm, torch.func.replace_all_batch_norm_modules_(model) "
        "or eval()"
    )


def refuse_running_statistics(who: str, model: nn.Module, remedy: str) -> None:
    """Refuse a model that has a normalisation layer in training mode with running statistics.

    Raises:
        ValueError: it has; the message names the layer.
    """
    for name, module in model.named_modules():
        if _updates_statistics(module):
            raise buffers_refused(who, f"{type(module).__name__} {name!r}", remedy)


def _updates_statistics(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return is_norm and module.training and module.running_mean is not None


@contextmanager
def statistics_watched(who: str, remedy: str) -> Iterator[None]:
    """Refuse modules that this thread runs in here and that would update running statistics.

    For models that nobody showed us. torch has such hooks for all modules of the process alone, so other
    threads' modules are let pass.

    Raises:
        ValueError: before such a module has changed anything.
    """
    thread = threading.get_ident()

    def check(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread and _updates_statistics(module):
            raise buffers_refused(who, type(module).__name__, remedy)

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        try:
            handle.remove()
        finally:
            handle.remove()  # once more, should the first have been interrupted: it would refuse for ever
