"""What a step changes is put back to the bit, or the step is refused."""

import re
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from optex.stepping import Attributes, Hyperparameters, Snapshot
from optex.stepping.snapshot import Settings


def parameters():
    return [nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2, 2))]


def step(base, count=1):
    for _ in range(count):
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        base.step()


class Own(torch.optim.SGD):
    """SGD with attributes of its own."""

    def __init__(self, **attributes):
        super().__init__(parameters(), lr=0.1)
        vars(self).update(attributes)


def own(**attributes) -> Any:
    """Such an optimizer, whose attributes a type checker does not know."""
    return Own(**attributes)


# ---------------------------------------------------------------------- groups


def test_settings_of_groups_are_put_back():
    first, second = parameters()
    base = torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    saved = Hyperparameters(base)
    for _ in range(2):
        for group in base.param_groups:
            group["lr"], group["betas"] = 5.0, (0.1, 0.2)
        saved.restore()
        assert [group["lr"] for group in base.param_groups] == [0.1, 0.2]
        assert [group["betas"] for group in base.param_groups] == [(0.9, 0.999)] * 2
    assert base.param_groups[0]["params"][0] is first


def test_a_rate_that_is_a_tensor_is_put_back_in_place():
    rate = torch.tensor(0.1)
    base = torch.optim.Adam(parameters(), lr=rate)
    saved = Hyperparameters(base)
    rate.fill_(7.0)
    saved.restore()
    assert base.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.1)


def test_a_setting_of_another_kind_is_put_back_as_a_copy():
    base: Any = torch.optim.Adam(parameters(), lr=torch.tensor(0.1))
    saved = Hyperparameters(base)
    for other in (0.5, torch.ones(3)):
        base.param_groups[0]["lr"] = other
        saved.restore()
        assert base.param_groups[0]["lr"] == torch.tensor(0.1)
        base.param_groups[0]["lr"].fill_(9.0)  # not what is saved
        saved.restore()
        assert base.param_groups[0]["lr"] == torch.tensor(0.1)


def test_containers_among_settings_are_copied():
    base = torch.optim.SGD([{"params": parameters(), "mine": [1, [2]]}], lr=0.1)
    saved = Hyperparameters(base)
    for _ in range(2):
        base.param_groups[0]["mine"].append(3)
        base.param_groups[0]["mine"][1].append(4)
        saved.restore()
        assert base.param_groups[0]["mine"] == [1, [2]]


# ---------------------------------------------------------------------- attributes


def make_attributes():
    return {
        "count": 1,
        "ratio": 0.5,
        "name": "x",
        "flag": True,
        "nothing": None,
        "many": [1, torch.zeros(2)],
        "named": {"a": (1, 2), "b": {3}},
        "recent": deque([1.0]),
        "mean": torch.zeros(2),
        "kind": torch.float32,
        "where": torch.device("cpu"),
        "bits": b"x",
        "frozen": frozenset({1}),
        "phase": 1j,
    }


def assert_attributes(base, expected):
    for name, value in expected.items():
        found = getattr(base, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value)
        elif name == "many":
            assert found[0] == value[0]
            assert torch.equal(found[1], value[1])
        else:
            assert found == value


def test_plain_attributes_are_put_back():
    base, mean = own(**make_attributes()), torch.zeros(2)
    base.mean = mean
    saved = Attributes(base)
    for _ in range(2):
        base.count, base.ratio, base.name, base.flag, base.nothing = 9, 9.0, "y", False, 9
        base.many[1].add_(1)
        base.many.append(9)
        base.named["a"] = 9
        base.recent.append(9.0)
        base.mean.add_(1)
        base.kind, base.where, base.bits, base.frozen, base.phase = 9, 9, 9, 9, 9
        saved.restore()
        saved.check()
        assert_attributes(base, make_attributes())
        assert base.mean is mean  # in place


def test_a_tensor_of_another_shape_is_put_back_as_a_copy():
    base = own(mean=torch.zeros(2))
    saved = Attributes(base)
    for _ in range(2):
        base.mean = torch.ones(3)
        saved.restore()
        assert base.mean.tolist() == [0, 0]
        base.mean.add_(1)


def test_attributes_that_came_since_are_taken_away():
    base = own(count=1)
    saved = Attributes(base)
    base.later = 5
    del base.count
    saved.restore()
    assert not hasattr(base, "later")
    assert base.count == 1
    assert {"state", "param_groups", "defaults"} <= vars(base).keys()
    step(base)


def test_objects_that_were_replaced_are_put_back():
    helper, other = {"a": object()}, {"b": object()}
    base = own(helper=helper)
    saved = Attributes(base)
    base.helper = other
    saved.restore()
    assert base.helper is helper
    saved.check()


class Counter:
    """An object that is neither number, tensor nor container."""

    def __init__(self):
        self.calls = 0


class Function(Counter):
    """One that is called, whose content nobody looks into."""

    def __call__(self):
        self.calls += 1


def test_what_is_called_may_change():
    base = own(function=Function())
    saved = Attributes(base)
    base.function()
    saved.check()


def test_a_dict_by_objects_is_no_plain_one():
    helper = {Function(): 1}
    base = own(helper=helper)
    saved = Attributes(base)
    base.helper = None
    saved.restore()
    assert base.helper is helper


def test_an_object_that_is_changed_in_place_is_refused_by_name():
    base = own(counter=Counter())
    saved = Attributes(base)
    saved.check()
    base.counter.calls += 1
    message = (
        "OptEx: a step of Own changes its attribute 'counter' (Counter) in place, and that cannot be taken "
        "back; keep what a step changes in state, in the groups, or in plain numbers and tensors"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        saved.check()


def test_what_cannot_be_told_is_not_refused():
    class Silent:
        def __reduce__(self):
            raise RuntimeError

    base = own(call=lambda: 1, silent=Silent())
    saved = Attributes(base)
    saved.check()
    saved.restore()


def test_a_parameter_among_attributes_stays_that_parameter():
    base = own()
    base.first = base.param_groups[0]["params"][0]
    saved = Attributes(base)
    saved.restore()
    assert base.first is base.param_groups[0]["params"][0]


class Around(torch.optim.Optimizer):
    """Wraps another optimizer, whose state and groups are its own."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.state, self.param_groups = inner, inner.state, inner.param_groups

    def step(self, closure=None) -> Any:
        self.inner.step()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapped_optimizer_is_looked_into(depth):
    inner = own(count=1, counter=Counter())
    base = inner
    for _ in range(depth):
        base = Around(base)
    saved = Attributes(base)
    inner.count = 5
    saved.restore()
    assert inner.count == 1
    saved.check()
    inner.counter.calls += 1
    with pytest.raises(TypeError, match="a step of Own changes its attribute 'counter'"):
        saved.check()


# ---------------------------------------------------------------------- all of it


def everything(base):
    state = [{k: v.clone() for k, v in base.state.get(p, {}).items()} for p in base.param_groups[0]["params"]]
    return [p.detach().clone() for p in base.param_groups[0]["params"]], state


def assert_same_everything(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left[0], right[0], strict=True))
    for a, b in zip(left[1], right[1], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_parameters_and_state_are_put_back_to_the_bit(kind, steps):
    base = kind(parameters(), lr=0.1)
    step(base, steps)
    live = {p: dict(entries) for p, entries in base.state.items()}
    before, snapshot = everything(base), Snapshot(base, None)
    for _ in range(2):
        step(base, 3)
        base.param_groups[0]["lr"] = 0.5
        snapshot.check()
        snapshot.restore()
        assert_same_everything(everything(base), before)
        assert base.param_groups[0]["lr"] == 0.1
    for p, entries in live.items():
        assert all(base.state[p][key] is value for key, value in entries.items())  # in place


def test_state_that_came_since_is_taken_away_and_what_went_comes_back():
    base = torch.optim.Adam(parameters(), lr=0.1)
    step(base)
    first, second = base.param_groups[0]["params"]
    before, snapshot = everything(base), Snapshot(base, None)
    del base.state[second]["exp_avg"]
    base.state[first]["later"] = torch.ones(1)
    snapshot.restore()
    assert_same_everything(everything(base), before)


def test_a_state_that_is_no_dict_is_refused():
    base = torch.optim.SGD(parameters(), lr=0.1)
    base.state[base.param_groups[0]["params"][0]] = [1]
    message = (
        "OptEx: SGD keeps a list as the state of a parameter, where torch's optimizers keep a dict; wrap it in "
        "one, as state[p] = {'value': ...}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Snapshot(base, None)


def test_empty_groups_pass():
    base = torch.optim.SGD([{"params": []}, {"params": parameters()}], lr=0.1)
    snapshot = Snapshot(base, None)
    step(base)
    snapshot.restore()
    assert base.param_groups[1]["params"][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("saving", [Settings, Snapshot])
def test_schedules_are_put_back(saving):
    base = torch.optim.SGD(parameters(), lr=0.1)
    scheduler = ExponentialLR(base, 0.5)
    base.step()
    scheduler.step()
    saved = saving(base, scheduler)
    for _ in range(2):
        step(base)
        scheduler.step()
        assert base.param_groups[0]["lr"] == 0.025
        saved.restore()
        assert base.param_groups[0]["lr"] == 0.05
        assert scheduler.last_epoch == 1
        assert scheduler.get_last_lr() == [0.05]


@pytest.mark.parametrize("saving", [Settings, Snapshot])
def test_steps_that_cannot_be_taken_back_are_refused_through_all(saving):
    base = own(counter=Counter(), count=1)
    saved = saving(base, None)
    base.count = 3
    saved.restore()
    assert base.count == 1
    saved.check()
    base.counter.calls += 1
    with pytest.raises(TypeError, match="that cannot be taken back"):
        saved.check()
