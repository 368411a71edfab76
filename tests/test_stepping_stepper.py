"""The plain stepper: steps with gradients that are handed to it, and back again."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from optex.stepping import ParameterVector, Stepper

DIMENSION = 7


def parameters():
    return [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2))]


def stepper_of(make: Any = torch.optim.Adam, *, scheduled=False) -> tuple[Any, Stepper, Any]:
    """A base, its stepper and its scheduler, if any."""
    trained = parameters()
    base = make(trained, lr=0.1)
    scheduler = ExponentialLR(base, 0.5) if scheduled else None
    return base, Stepper(base, ParameterVector(trained), scheduler), scheduler


def gradient(seed=0):
    return torch.randn(DIMENSION, generator=torch.Generator().manual_seed(seed))


def by_hand(count, *, scheduled=False, make=torch.optim.Adam):
    """The points of the base optimizer's own steps with those gradients."""
    trained, points = parameters(), []
    base = make(trained, lr=0.1)
    scheduler = ExponentialLR(base, 0.5) if scheduled else None
    for seed in range(count):
        pieces = gradient(seed).split([3, 4])
        trained[0].grad, trained[1].grad = pieces[0].clone(), pieces[1].view(2, 2).clone()
        base.step()
        if scheduler is not None:
            scheduler.step()
        points.append(torch.cat([p.detach().flatten() for p in trained]))
    return points


@pytest.mark.parametrize("scheduled", [False, True])
def test_steps_are_the_base_optimizers_and_taken_back_to_the_bit(scheduled):
    base, stepper, scheduler = stepper_of(scheduled=scheduled)
    start = stepper.point
    for way in (stepper.rewind, stepper.take_back, stepper.rewind):
        for seed, expected in enumerate(by_hand(3, scheduled=scheduled)):
            assert stepper.taken == seed
            stepper.step(gradient(seed))
            assert torch.equal(stepper.point, expected)
        assert stepper.taken == 3
        way()
        assert stepper.taken == 0
        assert torch.equal(stepper.point, start)
        assert not base.state
        assert base.param_groups[0]["lr"] == 0.1
        assert scheduler is None or scheduler.last_epoch == 0


def test_a_mark_is_where_the_way_back_ends():
    _, stepper, _ = stepper_of()
    stepper.step(gradient(0))
    stepper.mark()
    assert stepper.taken == 0
    here = stepper.point
    stepper.step(gradient(1))
    stepper.rewind()
    assert torch.equal(stepper.point, here)
    stepper.mark(ahead=False)
    stepper.step(gradient(1))
    stepper.rewind()
    assert torch.equal(stepper.point, here)


def test_all_parameters_get_a_gradient_until_the_mask_says_otherwise():
    base, stepper, _ = stepper_of()
    assert stepper.mask == (True, True)
    stepper.mask = (False, True)
    stepper.step(gradient())
    first, second = base.param_groups[0]["params"]
    assert first.grad is None
    assert first.tolist() == [0, 1, 2]
    assert not (second == 1).any()


def test_steps_with_the_gradients_that_are_there_count_and_tick():
    base, stepper, scheduler = stepper_of(torch.optim.SGD, scheduled=True)
    for p in base.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    stepper.step_with_current_gradients()
    assert scheduler.last_epoch == stepper.taken == 1
    assert torch.allclose(stepper.point, torch.tensor([-0.1, 0.9, 1.9, 0.9, 0.9, 0.9, 0.9]))


def test_a_plain_steppers_steps_are_of_no_rule():
    assert stepper_of(torch.optim.SGD)[1].linear_rule() is None


def test_points_are_copies_and_can_be_moved_to():
    base, stepper, _ = stepper_of()
    stepper.point.zero_()
    assert base.param_groups[0]["params"][0].tolist() == [0, 1, 2]
    stepper.move_to(gradient(3))
    assert torch.equal(stepper.point, gradient(3))
    assert stepper.taken == 0


def test_steps_worked_out_elsewhere_are_arrived_at():
    base, stepper, _ = stepper_of(torch.optim.SGD)
    stepper.mask = (True, False)
    buffer = gradient(5)
    stepper.arrive(gradient(3), gradient(4), {"momentum_buffer": buffer}, 4)
    assert stepper.taken == 4
    assert torch.equal(stepper.point, gradient(3))
    first, second = base.param_groups[0]["params"]
    assert first.grad is not None
    assert torch.equal(first.grad, gradient(4)[:3])
    assert second.grad is None
    assert torch.equal(base.state[second]["momentum_buffer"], buffer[3:].view(2, 2))
    base.state[first]["momentum_buffer"].zero_()
    assert buffer[:3].all()


# ---------------------------------------------------------------------- bases that want to know more


class Knowing(torch.optim.SGD):
    """Freezes while drafting, and observes evaluations."""

    needs_graph = False

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.frozen, self.log = 0, []

    @contextlib.contextmanager
    def drafting(self):
        self.frozen += 1
        try:
            yield
        finally:
            self.frozen -= 1

    def observe(self):
        return "seen"

    def recall(self, observation):
        self.log.append(observation)

    def step(self, closure=None):
        self.log.append("frozen" if self.frozen else "step")
        super().step(closure)


def test_drafting_freezes_what_wants_to_be_frozen():
    base, stepper, _ = stepper_of(Knowing)
    with stepper.drafting():
        assert base.frozen == 1
    assert base.frozen == 0
    _, stepper, _ = stepper_of()
    with stepper.drafting():
        stepper.step(gradient())
    assert stepper.taken == 1


def test_observations_are_handed_back_before_the_step_that_uses_them():
    base, stepper, _ = stepper_of(Knowing)
    assert stepper.observe is not None
    assert stepper.observe() == "seen"
    stepper.recall(["a", "b"], 1)
    stepper.recall(None, 0)
    assert base.log == ["b"]
    _, plain, _ = stepper_of()
    assert plain.observe is None
    plain.recall(["a", "b"], 1)


# ---------------------------------------------------------------------- saved states


def test_states_are_the_base_optimizers():
    _, stepper, _ = stepper_of()
    stepper.step(gradient())
    assert stepper.state_dict()["state"].keys() == {0, 1}
    other, twin, _ = stepper_of()
    twin.load_state_dict(stepper.state_dict())
    assert torch.equal(other.state[other.param_groups[0]["params"][0]]["exp_avg"], 0.1 * gradient()[:3])
    with pytest.raises(ValueError, match="group"):
        twin.load_state_dict(stepper_of()[1].state_dict() | {"param_groups": []})


def test_a_load_is_put_back_with_groups_hooks_and_schedule():
    base, stepper, scheduler = stepper_of(scheduled=True)
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("pre"))
    base.register_step_post_hook(lambda *_: calls.append("post"))
    stepper.step(gradient())
    groups, point, rate = base.param_groups, stepper.point, base.param_groups[0]["lr"]
    average = base.state[base.param_groups[0]["params"][0]]["exp_avg"].clone()
    put_back = stepper.held()
    stepper.load_state_dict(stepper_of(scheduled=True)[1].state_dict())
    base._optimizer_step_pre_hooks.clear()
    base._optimizer_step_pre_hooks = type(base._optimizer_step_pre_hooks)()
    base._optimizer_step_post_hooks = type(base._optimizer_step_post_hooks)()
    stepper.move_to(gradient(8))
    scheduler.last_epoch = 17
    put_back()
    assert base.param_groups is groups
    assert base.param_groups[0]["lr"] == rate == 0.05
    assert torch.equal(stepper.point, point)
    assert torch.equal(base.state[groups[0]["params"][0]]["exp_avg"], average)
    assert scheduler.last_epoch == 1
    calls.clear()
    stepper.step(gradient())
    assert calls == ["post"]  # the other's dict was emptied, not replaced


def test_a_state_that_can_be_stepped_with_is_left_as_it_is():
    base, stepper, scheduler = stepper_of(scheduled=True)
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("pre"))
    base.register_step_post_hook(lambda *_: calls.append("post"))
    stepper.step(gradient())
    calls.clear()
    point, gradients = stepper.point, [p.grad for p in base.param_groups[0]["params"]]
    stepper.check_step()
    assert calls == []
    assert torch.equal(stepper.point, point)
    assert all(p.grad is g for p, g in zip(base.param_groups[0]["params"], gradients, strict=True))
    assert scheduler.last_epoch == 1
    assert stepper.taken == 0
    stepper.step(gradient())
    assert calls == ["pre", "post"]


def test_trial_steps_are_two_with_gradients_of_zero_and_frozen():
    seen = []

    class Watching(Knowing):
        def step(self, closure=None):
            seen.append((self.frozen, [p.grad.abs().sum().item() for p in self.param_groups[0]["params"]]))
            super().step(closure)

    _, stepper, _ = stepper_of(Watching)
    stepper.check_step()
    assert seen == [(1, [0.0, 0.0])] * 2


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_state_that_leads_nowhere_is_refused_and_taken_back(poison):
    base, stepper, _ = stepper_of()
    base.register_step_pre_hook(lambda *_: None)
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    stepper.step(gradient())
    base.state[base.param_groups[0]["params"][1]]["exp_avg"].fill_(poison)
    point, gradients = stepper.point, [p.grad for p in base.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"^steps with it lead to parameters that are not finite$"):
        stepper.check_step()
    assert torch.equal(stepper.point, point)
    assert all(p.grad is g for p, g in zip(base.param_groups[0]["params"], gradients, strict=True))
    assert (base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks) == hooks
    assert base._optimizer_step_pre_hooks is hooks[0]
