"""Several runs in several threads, and one run that two threads reach for."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.optimize import rosen, rosen_der
from threadpoolctl import threadpool_limits
from torch import nn

import optex
from tests.models import network, regression_batches, same, snapshot, squared_error


def training(*, paper):
    """What trains a network of its own; made before threads start, as its weights come from a global seed."""
    model, batches = network(seed=1), regression_batches(24)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = optex.OptEx.from_paper(base) if paper else optex.OptEx(base)

    def run():
        for _ in optimizer.rounds(batches, squared_error(model)):
            pass
        return snapshot(model)

    return run


def minimizing():
    def run():
        result = optex.minimize(rosen, [1.3, 0.7, 0.8], jac=rosen_der, maxiter=25)
        return [torch.from_numpy(result.x), torch.from_numpy(result.jac)]

    return run


def made():
    return [training(paper=False), training(paper=True), minimizing(), training(paper=False)]


@pytest.fixture
def one_thread_each():
    """The number of threads is the process's for BLAS, and each thread's own for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread_each")
def test_runs_at_once_give_the_bits_of_runs_in_turn():
    in_turn, runs = [run() for run in made()], made()
    barrier = threading.Barrier(len(runs), timeout=60)
    generator = torch.get_rng_state()

    def together(run):
        torch.set_num_threads(1)
        barrier.wait()
        return run()

    with ThreadPoolExecutor(len(runs)) as threads:
        at_once = list(threads.map(together, runs))
    assert all(same(expected, found) for expected, found in zip(in_turn, at_once, strict=True))
    # Shared by all threads; runs that draw nothing leave it where it stands.
    assert torch.equal(torch.get_rng_state(), generator)


# ------------------------------------------------------------------ one object


class Held:
    """An optimizer whose round waits inside its objective until it is let go."""

    def __init__(self):
        self.theta = nn.Parameter(torch.full((3,), 2.0))
        self.optimizer = optex.OptEx(torch.optim.SGD([self.theta], lr=0.1), parallelism=2)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def objective(self, _):
        self.inside.set()
        assert self.go_on.wait(60)
        return self.theta.square().sum()

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.theta.square().sum()
        loss.backward()
        return loss


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("step", lambda held: held.optimizer.step(held.closure)),
        ("step", lambda held: held.optimizer.step()),
        ("rounds", lambda held: next(held.optimizer.rounds(range(4), held.objective))),
        ("state_dict", lambda held: held.optimizer.state_dict()),
        ("load_state_dict", lambda held: held.optimizer.load_state_dict({})),
    ],
)
def test_a_second_thread_is_refused_and_the_first_one_goes_on(name, use):
    held, plain = Held(), Held()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: list(held.optimizer.rounds(range(8), held.objective)))
        assert held.inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=rf"OptEx\.{name}: another thread .* nothing was changed"):
                use(held)
        finally:
            held.go_on.set()
        running.result(60)
    plain.go_on.set()
    list(plain.optimizer.rounds(range(8), plain.objective))
    assert torch.equal(held.theta, plain.theta)
    assert held.optimizer.batches_drawn == plain.optimizer.batches_drawn == 8
    held.optimizer.step(held.closure)  # nobody is in a round any more


def test_a_round_that_fails_lets_the_next_thread_in():
    held = Held()

    def broken(_):
        raise KeyError("broken")

    with pytest.raises(KeyError):
        next(held.optimizer.rounds(range(4), broken))
    with ThreadPoolExecutor(1) as threads:
        assert float(threads.submit(held.optimizer.step, held.closure).result(60)) == 12.0


def test_a_loop_left_between_two_rounds_may_go_on_in_another_thread():
    held = Held()
    held.go_on.set()
    loop = held.optimizer.rounds(range(8), held.objective)
    next(loop)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: list(loop)).result(60)
    assert held.optimizer.batches_drawn == 8


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_made_within_a_round_has_nobody_in_it(twin_of):
    theta = nn.Parameter(torch.ones(2))
    optimizer, entered = optex.OptEx(torch.optim.SGD([theta], lr=0.1)), []

    def enter(twin):
        with twin.entered("test"):
            entered.append(twin)

    def objective(_):
        twin = twin_of(optimizer._rounds.one_thread)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(enter, twin).result(60)
        return theta.square().sum()

    next(optimizer.rounds(range(1), objective))
    assert entered
