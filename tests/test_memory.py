"""What a history in another precision costs."""

import itertools

import pytest
import torch

from optex import CurlFreeEstimator, HoldLast, OptEx
from optex.studies.problems import make_problem


@pytest.mark.parametrize("estimator", [CurlFreeEstimator(noise_variance=1e-2), HoldLast(), None])
def test_a_bfloat16_history_trains_nearly_as_well(estimator):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem("digits-mlp", seed=0)
        optimizer = OptEx(
            torch.optim.Adam(problem.parameters(), lr=1e-3), stride=1, estimator=estimator, history_dtype=dtype
        )
        for _ in itertools.islice(optimizer.rounds(problem.batches(), problem), 15):
            pass
        assert optimizer.history.gradients.dtype == dtype
        losses.append(problem.evaluate())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
