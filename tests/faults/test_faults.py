"""Nothing torn: rounds and loads interrupted, starved of memory, signalled, fed broken states. A sample of
benchmarks/faults.py, which breaks them everywhere."""

import copy
import random
import signal
import threading
import time

import pytest
import torch

from optex import SequentialEvaluator, WithinTolerance, WorkersEvaluator
from tests.faults.injection import (
    Lines,
    Net,
    Operations,
    Plain,
    Run,
    assert_start_or_end,
    count,
    load_mutated,
    plain_end,
    sweep,
)
from tests.models import assert_equal_trees

SAMPLED = 25  # places of each sweep
# Copies of a run have schedulers of their own, whose optimizers torch takes for wrapped ones.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")


def prepared(rounds, **settings):
    run = Run(**settings)
    for _ in range(rounds):
        run.round()
    return run


def places(fault, run, action):
    most = count(fault, run, action)
    return random.Random(0).sample(range(1, most + 1), SAMPLED)


def test_the_run_in_peace_is_the_plain_loop():
    assert_equal_trees(Run().finish().model.state_dict(), plain_end(Net()))


@pytest.mark.parametrize("fault", [Lines, Operations])
@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_a_broken_round_is_whole(fault, rounds, tolerance):
    run = prepared(rounds, tolerance=tolerance)
    end = plain_end(Net()) if tolerance == 0 else None
    found = sweep(fault, run, Run.round, places(fault, run, Run.round), end)
    assert sum(found.values()) == SAMPLED


def load_ahead(run):
    run.optimizer.load_state_dict(run.ahead)


@pytest.mark.parametrize("fault", [Lines, Operations])
def test_a_broken_load_is_whole(fault):
    run = prepared(3)
    run.ahead = copy.deepcopy(prepared(5).optimizer.state_dict())
    found = sweep(fault, run, load_ahead, places(fault, run, load_ahead), None)
    assert sum(found.values()) == SAMPLED


def test_the_last_lines_of_a_round_are_behind_its_commit():
    run = prepared(3)
    last = count(Lines, run, Run.round)
    found = sweep(Lines, run, Run.round, range(last - 10, last), plain_end(Net()))
    assert found["end"] >= 8
    assert found["start"] == 0


@pytest.mark.parametrize("seed", range(0, 150, 10))
def test_a_broken_state_dict_is_refused_or_runs(seed):
    state = copy.deepcopy(prepared(5, tolerance=2.0).optimizer.state_dict())
    target = prepared(3, tolerance=2.0)
    found = [load_mutated(copy.deepcopy(target), state, seed + i) for i in range(10)]
    assert "refused" in found


@pytest.mark.parametrize(
    ("other", "named"),
    [("parameters", "parameter group"), ("acceptance", "tolerance"), ("committee", "scores")],
)
def test_the_state_of_another_optimizer_is_refused_by_name(other, named):
    run, target = prepared(3, tolerance=2.0), prepared(2, tolerance=2.0)
    state = copy.deepcopy(run.optimizer.state_dict())
    if other == "parameters":
        del state["param_groups"][0]["params"][-1]
    elif other == "acceptance":
        state["optex"]["acceptance"] = {}
    else:
        state["optex"]["estimator"]["scores"] = torch.zeros(2)
    before = target.state()
    with pytest.raises(ValueError, match=named):
        target.optimizer.load_state_dict(state)
    assert_equal_trees(target.state(), before)


# ---------------------------------------------------------------- real signals


class Rung(KeyboardInterrupt):
    """What the alarm raises."""


@pytest.fixture
def alarm():
    def ring(*_):
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("make", "tries"), [(SequentialEvaluator, 40), (lambda: WorkersEvaluator(2), 12)])
def test_signals_at_random_moments_leave_the_rounds_start_or_end(alarm, request, make, tries):
    moments, end = random.Random(1), plain_end(Plain())
    evaluator = make()
    if isinstance(evaluator, WorkersEvaluator):
        request.addfinalizer(evaluator.close)
    prepared(2, model=Plain(), evaluator=evaluator)  # starts what has to be started
    started = time.perf_counter()
    prepared(3, model=Plain(), evaluator=evaluator)
    seconds = (time.perf_counter() - started) / 3
    broken = 0
    for _ in range(tries):
        run, twin = (prepared(2, model=Plain(), evaluator=evaluator) for _ in range(2))
        start = run.state()
        twin.state()  # saving brings Gram matrices up to date
        twin.round()
        try:
            alarm(moments.uniform(1e-4, seconds))
            run.round()
            alarm(0)
        except Rung:
            broken += 1
            run.generator = twin.generator if run.optimizer.steps_taken > 2 else run.generator
            assert_start_or_end(run, start, twin.state())
        assert_equal_trees(run.finish().model.state_dict(), end)
    assert broken > tries / 4


# ---------------------------------------------------------------- threads


def test_independent_optimizers_run_in_parallel_threads():
    expected = {
        tolerance: Run(tolerance, model=Plain()).finish().model.state_dict() for tolerance in (0.0, 2.0)
    }
    runs = [Run(tolerance, model=Plain()) for tolerance in (0.0, 2.0, 0.0, 2.0)]
    threads = [
        threading.Thread(target=lambda run=run: list(run.optimizer.rounds(run.batches, run.model)))
        for run in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        rule = run.optimizer.acceptance
        assert isinstance(rule, WithinTolerance)
        assert_equal_trees(run.model.state_dict(), expected[0.0 if rule.tolerance == 0 else 2.0])
