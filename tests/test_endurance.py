"""Nothing grows from round to round; benchmarks/endurance.py watches a network for thousands of rounds."""

import gc
import itertools
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from optex import OptEx, SequentialEvaluator, WithinTolerance


def census():
    """Live objects of torch and of ours by their kind, bytes of their tensors, and blocks that Python holds."""
    gc.collect()
    live = gc.get_objects()
    kinds = Counter(
        type(one).__qualname__ for one in live if str(type(one).__module__).startswith(("optex", "torch"))
    )
    tensors = sum(one.numel() * one.element_size() for one in live if type(one) in (torch.Tensor, nn.Parameter))
    return kinds, tensors, sys.getallocatedblocks()


def endless(*, paper=False, leave=False, hook=None, **options):
    """An optimizer over three numbers that never settle, and what makes its rounds."""
    theta = nn.Parameter(torch.ones(3))
    base = torch.optim.Adam([theta], lr=0.05)
    optimizer = OptEx.from_paper(base, history_size=6) if paper else OptEx(base, history_size=6, **options)
    if hook is not None:
        optimizer.gradient_hook = hook
    generator = torch.Generator().manual_seed(0)
    batches = (torch.randn(3, generator=generator) for _ in itertools.count())
    objective = lambda batch: (theta - batch).square().sum() + theta.sin().sum()  # noqa: E731
    if not leave:
        return optimizer, optimizer.rounds(batches, objective)
    return optimizer, (next(optimizer.rounds(batches, objective)) for _ in itertools.count())


@pytest.mark.parametrize(
    ("settings", "early", "late"),
    [
        ({"parallelism": 2}, 500, 2000),
        ({"parallelism": 1}, 100, 400),
        ({"paper": True}, 100, 400),
        # A new loop each round, and steps that wait in the window.
        ({"leave": True, "acceptance": WithinTolerance(0.05, adaptive=False), "stride": 1}, 100, 400),
        ({"hook": lambda: None, "evaluator": SequentialEvaluator(), "on_nonfinite": "skip"}, 100, 400),
    ],
    ids=["defaults", "alone", "paper", "loops", "hook"],
)
def test_no_object_is_left_behind_by_a_round(settings, early, late):
    optimizer, rounds = endless(**settings)
    for _ in itertools.islice(rounds, early):
        pass
    kinds, tensors, blocks = census()
    for _ in itertools.islice(rounds, late - early):
        pass
    after = census()
    assert optimizer.last_report is not None
    assert optimizer.last_report.number == late - 1
    # A window, a queue and a history hold a few more or less at any moment; a leak would be hundreds.
    assert not {kind: count - kinds[kind] for kind, count in after[0].items() if count > kinds[kind] + 30}
    assert after[1] - tensors < 2_000
    if sys.gettrace() is None:  # who traces, as coverage does, keeps what it has seen
        assert after[2] - blocks < 0.5 * (late - early)
