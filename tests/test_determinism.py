"""The same bits twice where torch is told to compute deterministically; that mode fills new memory with NaN."""

import copy

import pytest
import torch
from scipy.optimize import rosen, rosen_der
from torch import nn

from optex import OptEx, VectorizedEvaluator, minimize
from tests.models import network, regression_batches, same, snapshot, squared_error


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def embedded(dtype=torch.float32):
    """Dropout, and an embedding, whose gradient is summed by index."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 1))
    batches = [(torch.randint(7, (8, 3)), torch.randn(8, 1)) for _ in range(16)]
    return model.to(dtype), batches


def regression(dtype=torch.float32):
    return network(seed=2, dtype=dtype), regression_batches(24, dtype=dtype)


def run(made, wrap):
    model, batches = made()
    torch.manual_seed(11)  # of dropout
    optimizer = wrap(model)
    told = [(r.loss, r.accepted) for r in optimizer.rounds(batches, squared_error(model))]
    assert optimizer.steps_taken == sum(accepted for _, accepted in told) >= len(told)
    return told, snapshot(model)


WRAPS = {
    "defaults": lambda model: OptEx(torch.optim.Adam(model.parameters(), lr=0.01)),
    "momentum": lambda model: OptEx(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)),
    "alone": lambda model: OptEx(torch.optim.AdamW(model.parameters(), lr=0.01), parallelism=1),
    "from_paper": lambda model: OptEx.from_paper(torch.optim.Adam(model.parameters(), lr=0.01)),
    "fitted": lambda model: OptEx.from_paper(
        torch.optim.Adam(model.parameters(), lr=0.01),
        lengthscale="leave-one-out",
        noise_variance="leave-one-out",
        selection="lowest-loss",
    ),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("made", [regression, embedded])
def test_runs_give_the_same_bits_twice_and_those_of_the_other_mode(made, wrap):
    plain = run(made, wrap)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(made, wrap), run(made, wrap)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == second[0] == plain[0]
    assert same(first[1], second[1])
    assert same(first[1], plain[1])


@pytest.mark.usefixtures("deterministic")
def test_vectorized_runs_give_the_same_bits_twice():
    wrap = lambda model: OptEx(  # noqa: E731
        torch.optim.Adam(model.parameters(), lr=0.01), evaluator=VectorizedEvaluator(model)
    )
    first, second = run(regression, wrap), run(regression, wrap)
    assert first[0] == second[0]
    assert same(first[1], second[1])


@pytest.mark.parametrize("options", [{}, {"lr": 0.02}, {"optimizer": "sgd", "parallelism": 1}])
def test_minimize_gives_the_same_bits_twice_and_those_of_the_other_mode(options):
    find = lambda: minimize(rosen, [1.3, 0.7, 0.8], jac=rosen_der, maxiter=20, **options)  # noqa: E731
    plain = find()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = find(), find()
    finally:
        torch.use_deterministic_algorithms(False)
    for other in (second, plain):
        assert first.x.tolist() == other.x.tolist()
        assert first.jac.tolist() == other.jac.tolist()
        assert (first.fun, first.nit, first.njev, first.nstep) == (
            other.fun,
            other.nit,
            other.njev,
            other.nstep,
        )


@pytest.mark.usefixtures("deterministic")
def test_a_saved_run_goes_on_with_the_same_bits():
    model, batches = embedded()
    optimizer = WRAPS["defaults"](model)
    loop = optimizer.rounds(batches, squared_error(model))
    next(loop)
    next(loop)
    # What goes on writes into the tensors that a state dict refers to.
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = [report.loss for report in loop]
    twin, _ = embedded()
    resumed = WRAPS["defaults"](twin)
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert [r.loss for r in resumed.rounds(batches[resumed.batches_drawn :], squared_error(twin))] == expected
    assert same(snapshot(model), snapshot(twin))
