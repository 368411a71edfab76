"""What every source of the family promises: one suite over the table."""

import copy
import itertools

import pytest
import torch

from optex import NonFiniteError, OptEx, SequentialEvaluator, WithinTolerance, WorkersEvaluator
from tests.family import SOURCES
from tests.models import same

every = pytest.mark.parametrize("name", SOURCES)


def gradient_of(source, parameters, batch, seed=0):
    """One answer, at a seed of its own; the loss, and the gradients."""
    torch.manual_seed(seed)
    for p in parameters:
        p.grad = None
    with torch.enable_grad():
        loss, noise = source.gradient(batch)
    return loss, noise, [p.grad.detach().clone() for p in parameters]


def points(parameters):
    return [p.detach().clone() for p in parameters]


@every
def test_an_answer_is_a_loss_and_finite_gradients_and_moves_nothing(name):
    source, parameters, batches = SOURCES[name].make()
    before = points(parameters)
    loss, noise, gradients = gradient_of(source, parameters, batches(1)[0])
    assert loss.shape == ()
    assert loss.isfinite()
    assert not loss.requires_grad
    assert noise is None or (noise.shape == () and noise >= 0)
    assert all(g.shape == p.shape and g.isfinite().all() for g, p in zip(gradients, parameters, strict=True))
    assert same(before, points(parameters))
    assert source.evaluations >= 1


@every
def test_an_answer_depends_on_point_batch_and_seed_alone(name):
    # Proxies are evaluated in any order, here or elsewhere, and evaluated again after a failure.
    source, parameters, batches = SOURCES[name].make()
    one, two = batches(2)
    first = gradient_of(source, parameters, one)
    gradient_of(source, parameters, two, seed=1)
    again = gradient_of(source, parameters, one)
    assert torch.equal(first[0], again[0])
    assert same(first[2], again[2])


@every
def test_answers_are_the_same_for_any_batch_and_seed_where_that_is_declared_and_only_there(name):
    source, parameters, batches = SOURCES[name].make()
    first, *others = (gradient_of(source, parameters, batch, seed) for seed, batch in enumerate(batches(4)))
    alike = all(torch.equal(first[0], other[0]) and same(first[2], other[2]) for other in others)
    assert alike == source.deterministic


@pytest.mark.parametrize("name", [name for name, row in SOURCES.items() if row.exact is not None])
def test_the_mean_answer_is_the_gradient(name):
    row = SOURCES[name]
    assert row.exact is not None
    source, parameters, batches = row.make()
    answers = [
        gradient_of(source, parameters, batch, seed)[2] for seed, batch in enumerate(batches(row.answers))
    ]
    mean = torch.cat([torch.stack(pieces).mean(0).flatten() for pieces in zip(*answers, strict=True)])
    exact = torch.cat([g.flatten() for g in row.exact(source, parameters)])
    assert (mean - exact).norm() <= row.tolerance * exact.norm()


@every
@pytest.mark.parametrize("parallelism", [1, 4])
def test_tolerance_0_is_the_plain_loop_to_the_bit(name, parallelism):
    row = SOURCES[name]
    source, parameters, batches = row.make()
    base, trajectory = torch.optim.SGD(parameters, lr=row.lr), []
    torch.manual_seed(3)
    for batch in batches(7):
        base.zero_grad()
        source.gradient(batch)
        base.step()
        trajectory.append(points(parameters))
    source, parameters, batches = row.make()
    torch.manual_seed(3)
    optimizer = OptEx(
        torch.optim.SGD(parameters, lr=row.lr),
        parallelism=parallelism,
        stride=1,
        acceptance=WithinTolerance(0),
    )
    for _ in optimizer.rounds(batches(7), source):
        assert same(points(parameters), trajectory[optimizer.steps_taken - 1])
    assert optimizer.steps_taken == 7


@every
def test_a_run_stopped_and_resumed_is_the_run_in_one(name):
    row = SOURCES[name]

    def made():
        source, parameters, batches = row.make()
        return source, parameters, batches(24), OptEx(torch.optim.SGD(parameters, lr=row.lr), parallelism=3)

    source, parameters, batches, optimizer = made()
    torch.manual_seed(4)
    rounds = optimizer.rounds(iter(batches), source)
    for _ in itertools.islice(rounds, 3):
        pass
    saved, here, drawn = copy.deepcopy(optimizer.state_dict()), points(parameters), optimizer.batches_drawn
    for _ in rounds:
        pass
    other_source, twins, batches, other = made()
    with torch.no_grad():
        for twin, value in zip(twins, here, strict=True):
            twin.copy_(value)
    other.load_state_dict(saved)
    for _ in other.rounds(iter(batches[drawn:]), other_source):
        pass
    assert same(points(parameters), points(twins))


@pytest.mark.parametrize("name", [name for name, row in SOURCES.items() if row.pickles])
def test_workers_answer_what_this_process_does(name):
    row, ends = SOURCES[name], []
    with WorkersEvaluator(2) as workers:
        for evaluator in (SequentialEvaluator(), workers):
            source, parameters, batches = row.make()
            torch.manual_seed(6)
            optimizer = OptEx(torch.optim.SGD(parameters, lr=row.lr), parallelism=3, evaluator=evaluator)
            for _ in itertools.islice(optimizer.rounds(iter(batches(12)), source), 3):
                pass
            ends.append(points(parameters))
    for here, there in zip(*ends, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


@every
def test_parameters_that_are_not_finite_lose_nothing(name):
    source, parameters, batches = SOURCES[name].make()
    with torch.no_grad():
        parameters[0].view(-1)[0] = torch.nan
    before = points(parameters)
    optimizer = OptEx(torch.optim.SGD(parameters, lr=0.1), parallelism=2)
    with pytest.raises(NonFiniteError):
        next(optimizer.rounds(iter(batches(4)), source))
    assert all(
        torch.equal(p.nan_to_num(7.0), b.nan_to_num(7.0))
        for p, b in zip(points(parameters), before, strict=True)
    )
