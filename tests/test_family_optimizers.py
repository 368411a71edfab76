"""What every optimizer of the family promises, as torch tests its own: one suite over the table."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from optex import NonFiniteError, OptEx, WithinTolerance
from optex.optimizers.step_rule import checked_gradients
from tests.family import FAMILY, Member
from tests.gradients import grad_of
from tests.models import assert_equal_trees, network, regression_batches, same, snapshot, squared_error

COUNT = 6


def backward(loss, member):
    loss.backward(create_graph=member.needs_graph)


def train(member, model, optimizer, batches):
    """The plain loop; random numbers are pinned, for those that probe."""
    objective = squared_error(model)
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        optimizer.zero_grad()
        backward(objective(batch), member)
        optimizer.step()


# What takes lists of parameter groups: how it is made, and its row.
GROUPED: dict[str, tuple[Callable[[list[dict]], Any], Member]] = {
    name: (member.make_groups, member) for name, member in FAMILY.items() if member.make_groups is not None
}

every = pytest.mark.parametrize("name", FAMILY)
grouped = pytest.mark.parametrize("name", GROUPED)


@every
def test_the_loss_falls(name):
    model, member = network(), FAMILY[name]
    batches = regression_batches(1) * 60
    before = squared_error(model)(batches[0]).item()
    train(member, model, member.make(model), batches)
    assert squared_error(model)(batches[0]).item() < 0.9 * before


@every
def test_runs_repeat_to_the_bit(name):
    member, runs = FAMILY[name], []
    for _ in range(2):
        model = network()
        train(member, model, member.make(model), regression_batches(COUNT))
        runs.append(snapshot(model))
    assert same(*runs)


@every
def test_a_closure_is_called_once_and_its_loss_returned(name):
    model, member = network(), FAMILY[name]
    optimizer, (batch,) = member.make(model), regression_batches(1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(batch)
        backward(loss, member)
        losses.append(float(loss.detach()))
        return loss

    returned = optimizer.step(closure)
    assert isinstance(returned, torch.Tensor)
    assert [float(returned.detach())] == losses


@every
def test_a_run_goes_on_from_its_state_dict(name):
    member, batches = FAMILY[name], regression_batches(2 * COUNT)
    model = network()
    optimizer = member.make(model)
    train(member, model, optimizer, batches[:COUNT])
    twin = network(seed=1)
    other = member.make(twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, own in ((model, optimizer), (twin, other)):
        train(member, net, own, batches[COUNT:])
    assert same(snapshot(model), snapshot(twin))


@every
def test_a_state_dict_is_saved_and_loaded_by_torch(name, tmp_path):
    model, member = network(), FAMILY[name]
    optimizer = member.make(model)
    train(member, model, optimizer, regression_batches(COUNT))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = member.make(copy.deepcopy(model))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal_trees(other.state_dict(), optimizer.state_dict())


@every
def test_copies_and_pickles_go_on_alike(name):
    # Model and optimizer together, or the copy would step parameters of its own that no model has.
    member, batches = FAMILY[name], regression_batches(2 * COUNT)
    model = network()
    optimizer = member.make(model)
    train(member, model, optimizer, batches[:COUNT])
    optimizer.zero_grad()
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for net, own in (*copies, (model, optimizer)):
        train(member, net, own, batches[COUNT:])
    for net, _ in copies:
        assert same(snapshot(net), snapshot(model))


@every
def test_frozen_parameters_and_those_without_gradient_stay(name):
    model, member = network(), FAMILY[name]
    optimizer = member.make(model)
    weight = model.get_parameter("0.weight").requires_grad_(False)
    frozen = weight.detach().clone()
    train(member, model, optimizer, regression_batches(3))
    assert torch.equal(weight, frozen)
    before = snapshot(model)
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient
    assert same(before, snapshot(model))


@every
def test_a_rate_of_zero_moves_nothing(name):
    model, member = network(), FAMILY[name]
    optimizer = member.make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = snapshot(model)
    train(member, model, optimizer, regression_batches(2))
    assert same(before, snapshot(model))


@every
def test_a_gradient_that_is_not_finite_is_named_and_nothing_moves(name):
    model, member = network(), FAMILY[name]
    optimizer = member.make(model)
    train(member, model, optimizer, regression_batches(2))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    loss = squared_error(model)(regression_batches(1)[0])
    backward(loss, member)
    grad_of(model.get_parameter("2.weight")).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"gradient.*not finite"):
        optimizer.step()
    assert same(before, snapshot(model))
    assert_equal_trees(optimizer.state_dict()["state"], state)


def test_gradients_whose_squares_overflow_are_finite_still():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    p.grad, q.grad = torch.full_like(p, 1e30), torch.ones_like(q)
    group = {"params": [p, q]}
    assert checked_gradients("Any", 0, group)[0] == [p, q]
    q.grad[0, 1] = -torch.inf
    with pytest.raises(NonFiniteError, match=r"Any: the gradient of parameter 1 \(2, 2\) of group 0"):
        checked_gradients("Any", 0, group)


@grouped
def test_groups_have_settings_of_their_own(name):
    make, member = GROUPED[name]
    model = network()
    optimizer = make([{"params": list(model[i].parameters())} for i in (0, 2)])
    optimizer.param_groups[1]["lr"] = 0.0
    first, last = snapshot(model[0]), snapshot(model[2])
    train(member, model, optimizer, regression_batches(3))
    assert same(last, snapshot(model[2]))
    assert not torch.equal(first[0], snapshot(model[0])[0])


@grouped
def test_maximize_is_minimising_the_negative(name):
    (make, member), ends = GROUPED[name], []
    for sign in (1, -1):
        model = network()
        optimizer = make([{"params": list(model.parameters()), "maximize": sign < 0}])
        objective = squared_error(model)
        for number, batch in enumerate(regression_batches(4)):
            torch.manual_seed(number)
            optimizer.zero_grad()
            backward(sign * objective(batch), member)
            optimizer.step()
        ends.append(snapshot(model))
    assert same(*ends)


@grouped
def test_complex_parameters_are_refused(name):
    make, _ = GROUPED[name]
    number = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))
    with pytest.raises(TypeError, match="complex"):
        make([{"params": [number]}])


@grouped
def test_sparse_gradients_are_refused_and_nothing_moves(name):
    make, _ = GROUPED[name]
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = make([{"params": list(table.parameters())}])
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(before, table.weight)


@grouped
@pytest.mark.parametrize("rate", [-1.0, float("nan"), "fast"])
def test_bad_rates_are_refused_by_name(name, rate):
    make, _ = GROUPED[name]
    with pytest.raises((ValueError, TypeError), match="lr"):
        make([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": rate}])


@every
def test_schedulers_drive_the_rate(name):
    model, member = network(), FAMILY[name]
    optimizer = member.make(model)
    first = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(member, model, optimizer, regression_batches(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * first)


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.compiles])
def test_a_compiled_step_is_the_step(name):
    if name == "n-igt" and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 breaks the graph where a step sets an attribute of its optimizer")
    member, ends = FAMILY[name], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        optimizer = member.make(model)
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
        objective = squared_error(model)
        for number, batch in enumerate(regression_batches(4)):
            torch.manual_seed(number)
            optimizer.zero_grad()
            backward(objective(batch), member)
            step()
        ends.append(snapshot(model))
    for left, right in zip(*ends, strict=True):
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- under OptEx


@every
@pytest.mark.parametrize("parallelism", [1, 4])
def test_tolerance_0_takes_the_plain_loops_steps_to_the_bit(name, parallelism):
    member, batches = FAMILY[name], regression_batches(9)
    plain = network()
    base, objective, trajectory = member.make(plain), squared_error(plain), []
    torch.manual_seed(5)
    for batch in batches:
        base.zero_grad()
        backward(objective(batch), member)
        base.step()
        trajectory.append(snapshot(plain))
    model = network()
    torch.manual_seed(5)
    optimizer = OptEx(
        member.make(model), parallelism=parallelism, stride=1, acceptance=WithinTolerance(0), model=model
    )
    for _ in optimizer.rounds(batches, squared_error(model)):
        assert same(snapshot(model), trajectory[optimizer.steps_taken - 1])
    assert optimizer.steps_taken == len(batches)


@every
def test_rounds_go_on_from_a_checkpoint(name):
    member, batches = FAMILY[name], regression_batches(24)

    def made():
        model = network()
        return model, OptEx(member.make(model), parallelism=3, model=model)

    model, optimizer = made()
    torch.manual_seed(1)
    rounds = optimizer.rounds(iter(batches), squared_error(model))
    for _ in range(3):
        next(rounds)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    drawn = optimizer.batches_drawn
    for _ in rounds:
        pass
    twin, other = made()
    twin.load_state_dict(weights)
    other.load_state_dict(saved)
    for _ in other.rounds(iter(batches[drawn:]), squared_error(twin)):
        pass
    assert same(snapshot(model), snapshot(twin))
