"""When steps may be taken on flat vectors, and when they are not."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from optex.stepping import FlatStepper, ParameterVector


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((2, 3), (4,), (1,))]


def step(base):
    for group in base.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p) if p.requires_grad else None
    base.step()


def flat_stepper(trained, base) -> Any:
    return FlatStepper(base, ParameterVector(trained))


def is_flat(stepper):
    stepper.mark()
    return stepper._is_ahead


class Mine(torch.optim.Adam):
    """A class that is not known to step every coordinate by itself."""


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_plain_parameters_are_walked_flat(make, steps):
    trained = parameters()
    base = make(trained)
    for _ in range(steps):
        step(base)
    stepper = flat_stepper(trained, base)
    assert is_flat(stepper)
    stepper.mark(ahead=False)
    assert not stepper._is_ahead
    assert is_flat(stepper)


def test_a_subclass_goes_the_plain_way():
    trained = parameters()
    assert not is_flat(flat_stepper(trained, Mine(trained)))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.double().t().contiguous().t() if p.ndim == 2 else p,
        lambda p: p.float() if p.ndim == 2 else p,
        lambda p: p.float() if p.numel() == 1 else p,
    ],
    ids=["layout", "first of another precision", "last of another precision"],
)
def test_parameters_that_differ_go_the_plain_way(change):
    trained = [nn.Parameter(change(p.detach())) for p in parameters()]
    assert not is_flat(flat_stepper(trained, torch.optim.Adam(trained)))


def test_a_parameter_of_a_class_of_its_own_goes_the_plain_way():
    trained = parameters()
    trained[1] = type("Special", (nn.Parameter,), {})(torch.ones(3, dtype=torch.float64))
    assert not is_flat(flat_stepper(trained, torch.optim.Adam(trained)))


def test_tensors_that_are_no_parameters_are_walked_flat_too():
    trained = [p.detach().clone().requires_grad_() for p in parameters()]
    assert is_flat(flat_stepper(trained, torch.optim.Adam(trained)))


@pytest.mark.parametrize("setting", ["fused", "differentiable"])
def test_settings_that_one_tensor_cannot_follow_go_the_plain_way(setting):
    trained = parameters()
    base = torch.optim.Adam([{"params": trained[:1]}, {"params": trained[1:]}])
    stepper = flat_stepper(trained, base)
    assert is_flat(stepper)
    base.param_groups[1][setting] = True
    assert not is_flat(stepper)


@pytest.mark.parametrize(
    "register",
    [
        lambda base, hook: base.register_step_pre_hook(hook),
        lambda base, hook: base.register_step_post_hook(hook),
        lambda base, hook: register_optimizer_step_pre_hook(hook),
        lambda base, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["before", "behind", "before any", "behind any"],
)
def test_hooks_are_called_at_every_step_and_so_go_the_plain_way(register):
    trained, calls = parameters(), []
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    handle = register(base, lambda *_: calls.append(1))
    try:
        assert not is_flat(stepper)
        stepper.step(torch.ones(11, dtype=torch.float64))
        assert calls == [1]
    finally:
        handle.remove()
    assert is_flat(stepper)


def test_attributes_and_steps_of_the_users_making_go_the_plain_way():
    trained = parameters()
    base: Any = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    base.calls = 0
    assert not is_flat(stepper)
    del base.calls
    assert is_flat(stepper)
    plain = base.step
    base.step = lambda *_: plain()
    assert not is_flat(stepper)


def test_a_schedulers_wrapper_is_no_step_of_the_users_making():
    trained = parameters()
    base = torch.optim.Adam(trained)
    scheduler = ExponentialLR(base, 0.9)
    assert is_flat(FlatStepper(base, ParameterVector(trained), scheduler))


def test_a_frozen_parameter_counts_once_it_has_a_gradient():
    trained = parameters()
    frozen = torch.ones(2, dtype=torch.float64)
    base = torch.optim.SGD([*trained, frozen], lr=0.1)
    stepper = flat_stepper(trained, base)
    assert is_flat(stepper)
    frozen.grad = torch.ones_like(frozen)
    assert not is_flat(stepper)


def test_other_parameters_than_the_vectors_go_the_plain_way():
    trained = parameters()
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    assert is_flat(stepper)
    base.param_groups[0]["params"] = [*trained[:2], nn.Parameter(torch.ones(1, dtype=torch.float64))]
    assert not is_flat(stepper)
    base.param_groups[0]["params"] = trained[:2]
    assert not is_flat(stepper)
    base.param_groups[0]["params"] = trained
    assert is_flat(stepper)


def test_groups_that_were_made_anew_are_walked_flat():
    trained = parameters()
    base = torch.optim.SGD(trained, lr=0.1)
    stepper = flat_stepper(trained, base)
    assert is_flat(stepper)
    (group,) = base.param_groups
    base.param_groups = [group | {"params": trained[:1], "lr": 0.5}, group | {"params": trained[1:]}]
    assert is_flat(stepper)
    before = stepper.point
    stepper.step(torch.ones(11, dtype=torch.float64))
    stepper.settle()
    assert torch.allclose(before - stepper.point, torch.tensor([0.5] * 6 + [0.1] * 5).double())


def test_parameters_without_a_gradient_go_the_plain_way():
    trained = parameters()
    stepper = flat_stepper(trained, torch.optim.Adam(trained))
    stepper.mask = (True, False, True)
    assert not is_flat(stepper)


def _of_another_kind(entries):
    entries["exp_avg"] = 1.0


def _of_fewer_digits(entries):
    entries["exp_avg"] = entries["exp_avg"].float()


def _of_another_shape(entries):
    entries["exp_avg"] = entries["exp_avg"].flatten()


def _in_another_layout(entries):
    entries["exp_avg"] = entries["exp_avg"].t().contiguous().t()


def _counted_apart(entries):
    entries["step"] += 1


def _counted_in_other_numbers(entries):
    entries["step"] = entries["step"].double()


def _counted_in_another_shape(entries):
    entries["step"] = entries["step"][None]


def _without_an_entry(entries):
    del entries["exp_avg_sq"]


def _with_an_entry_more(entries):
    entries["more"] = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "change",
    [
        _of_another_kind,
        _of_fewer_digits,
        _of_another_shape,
        _in_another_layout,
        _counted_apart,
        _counted_in_other_numbers,
        _counted_in_another_shape,
        _without_an_entry,
        _with_an_entry_more,
    ],
)
def test_a_state_that_cannot_be_joined_goes_the_plain_way(change):
    trained = parameters()
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    step(base)
    assert is_flat(stepper)
    change(base.state[trained[0]])
    assert not is_flat(stepper)


def test_counters_that_are_no_single_number_go_the_plain_way():
    trained = parameters()
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    step(base)
    for p in trained:
        base.state[p]["step"] = torch.ones(2)
    assert not is_flat(stepper)


def test_a_state_that_is_no_dict_goes_the_plain_way_and_is_refused_there():
    trained = parameters()
    base: Any = torch.optim.SGD(trained, lr=0.1)
    stepper = flat_stepper(trained, base)
    for p in trained:
        base.state[p] = [1]
    with pytest.raises(TypeError, match="OptEx: SGD keeps a list as the state of a parameter"):
        stepper.mark()


def test_entries_that_steps_added_go_when_they_are_taken_back():
    trained = parameters()
    base = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    stepper = flat_stepper(trained, base)
    stepper.mark()
    stepper.step(torch.ones(11, dtype=torch.float64))
    stepper.settle()
    assert all("momentum_buffer" in base.state[p] for p in trained)
    stepper.take_back()
    assert not any(base.state.get(p) for p in trained)


def test_what_is_handed_over_is_the_base_optimizers_own():
    trained = parameters()
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    for _ in range(2):
        stepper.mark()
        stepper.step(torch.ones(11, dtype=torch.float64))
        stepper.settle()
    first, second = (base.state[p] for p in trained[:2])
    assert first["step"] is not second["step"]
    before = second["exp_avg"].clone(), second["step"].clone()
    first["exp_avg"].zero_()
    first["step"].zero_()
    assert torch.equal(second["exp_avg"], before[0])
    assert torch.equal(second["step"], before[1])
    average = first["exp_avg"]
    stepper.mark()
    stepper.step(torch.ones(11, dtype=torch.float64))
    stepper.settle()
    assert base.state[trained[0]]["exp_avg"] is average  # in place


def ones():
    return torch.ones(11, dtype=torch.float64)


def momentum(trained):
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def test_a_linear_rule_holds_from_the_mark_on_and_no_further():
    trained = parameters()
    stepper = flat_stepper(trained, momentum(trained))
    stepper.mark()
    rule = stepper.linear_rule()
    assert rule is not None
    assert (rule.lr, rule.momentum) == (0.1, 0.9)
    stepper.step(ones())
    assert stepper.linear_rule() is None
    stepper.rewind()
    assert stepper.linear_rule() is not None
    stepper.mark(ahead=False)
    assert stepper.linear_rule() is None


def test_scheduled_steps_and_those_of_others_have_no_linear_rule():
    trained = parameters()
    base = momentum(trained)
    scheduled: Any = FlatStepper(base, ParameterVector(trained), ExponentialLR(base, 0.9))
    scheduled.mark()
    assert scheduled._is_ahead
    assert scheduled.linear_rule() is None
    adam = flat_stepper(trained, torch.optim.Adam(trained))
    adam.mark()
    assert adam.linear_rule() is None


def test_steps_worked_out_elsewhere_are_the_base_optimizers():
    trained = parameters()
    base = momentum(trained)
    stepper = flat_stepper(trained, base)
    stepper.mark()
    start = stepper.point
    stepper.arrive(2 * ones(), 3 * ones(), {"momentum_buffer": 4 * ones()}, 5)
    assert not stepper._is_ahead
    assert stepper.taken == 5
    assert torch.equal(stepper.point, 2 * ones())
    for p in trained:
        assert (p == 2).all()
        assert p.grad is not None
        assert (p.grad == 3).all()
        assert (base.state[p]["momentum_buffer"] == 4).all()
    stepper.step(ones())
    assert torch.allclose(trained[0].flatten(), torch.full((6,), 2 - 0.1 * 4.6).double())
    stepper.rewind()
    assert torch.equal(stepper.point, start)
    assert stepper._is_ahead


def test_schedules_come_back_to_the_mark():
    trained = parameters()
    base = momentum(trained)
    scheduler = ExponentialLR(base, 0.9)
    stepper: Any = FlatStepper(base, ParameterVector(trained), scheduler)
    for way in (stepper.rewind, stepper.take_back):
        stepper.mark()
        for _ in range(2):
            stepper.step(ones())
        assert scheduler.last_epoch == 2
        way()
        assert scheduler.last_epoch == 0
        assert base.param_groups[0]["lr"] == 0.1


def test_groups_that_are_divided_anew_are_walked_as_they_are():
    trained = parameters()
    base = torch.optim.SGD([{"params": trained[:1]}, {"params": trained[1:]}], lr=0.1)
    stepper = flat_stepper(trained, base)
    stepper.mark()
    flat = stepper._flat
    stepper.mark()
    assert stepper._flat is flat  # nothing is made anew where nothing has changed
    first, second = base.param_groups
    base.param_groups = [first | {"params": trained[:2], "lr": 0.5}, second | {"params": trained[2:]}]
    stepper.mark()
    before = stepper.point
    stepper.step(ones())
    stepper.settle()
    assert torch.allclose(before - stepper.point, torch.tensor([0.5] * 10 + [0.1]).double())


def test_long_groups_are_stepped_in_pieces(monkeypatch):
    monkeypatch.setattr("optex.stepping.flat._LONGEST", 5)
    trained = parameters()
    stepper = flat_stepper(trained, torch.optim.Adam(trained))
    stepper.mark()
    (group,) = stepper._flat._groups
    assert [tensor.numel() for tensor in group.tensors] == [5, 5, 1]


def test_a_state_from_before_the_mark_comes_back_in_place():
    trained = parameters()
    base = torch.optim.Adam(trained)
    stepper = flat_stepper(trained, base)
    step(base)
    averages = [base.state[p]["exp_avg"] for p in trained]
    before = [average.clone() for average in averages]
    stepper.mark()
    stepper.step(2 * ones())
    stepper.settle()
    assert not torch.equal(averages[0], before[0])
    stepper.take_back()
    for p, average, value in zip(trained, averages, before, strict=True):
        assert base.state[p]["exp_avg"] is average
        assert torch.equal(average, value)
