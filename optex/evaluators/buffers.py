"""Models whose buffers an evaluation would change beyond repair: all evaluators refuse them in the same words.

BatchNorm in training mode moves its running statistics at every point it is evaluated at, whether that point's
step is kept or not. Points evaluated in turn can pass the statistics on, if the model is known; points
evaluated at once cannot. How such a model is recognised depends on what is known of it: by its modules, if it
is at hand; by the versions of its tensors, in a worker's copy; by the modules that are run, if there is only a
closure.
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
        who: the evaluator, which the message begins with.
        what: the module or model that updates buffers.
        remedy: what helps with this evaluator, beside what helps with every one.
    """
    return ValueError(
        f"{who}: {what} updates buffers (BatchNorm's running statistics?) at every point evaluated, not at the "
        f"steps taken. {remedy}; or use torch.nn.GroupNorm, torch.func.replace_all_batch_norm_modules_(model) "
        "or eval()"
    )


def refuse_running_statistics(who: str, model: nn.Module, remedy: str) -> None:
    """Refuse a model that has a normalisation layer in training mode with running statistics.

    Raises:
        ValueError: the model has one; the message names the layer.
    """
    for name, module in model.named_modules():
        if _updates_statistics(module):
            raise buffers_refused(who, f"{type(module).__name__} {name!r}", remedy)


def _updates_statistics(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return is_norm and module.training and module.running_mean is not None


@contextmanager
def statistics_watched(who: str, remedy: str) -> Iterator[None]:
    """Refuse modules that would update running statistics, if this thread runs them inside the context.

    For closures, whose model is not known. The only hook of torch's for such modules is called for every module
    of the process, so those that other threads run are let pass here.

    Args:
        who, remedy: as in :func:`buffers_refused`.

    Raises:
        ValueError: such a module is about to run; it has changed nothing yet.
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
            handle.remove()  # again, in case the first call was interrupted: the hook would stay for good
