"""Steps on flat vectors are the plain stepper's."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from optex import Last, OptEx, WithinTolerance
from optex.stepping import ELEMENTWISE, FlatStepper, ParameterVector, Stepper, flat
from tests.bases import BASES
from tests.models import assert_equal_trees, network, regression_batches, squared_error

SHAPES = ((3, 5), (), (7,), (1, 4), (2, 3, 2), (1,))
DIMENSION = sum(torch.Size(shape).numel() for shape in SHAPES)
# The fused ones step all parameters at once by themselves; the others are not elementwise.
FLAT = [name for name in BASES if name not in ("adam-fused", "adafactor", "muon")]


class Twins:
    """A plain and a flat stepper, to be handed the same gradients."""

    def __init__(self, make, *, groups=True, scheduler=True, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=self.generator, dtype=dtype) for shape in SHAPES]
        self.dtype, self.steppers, self.bases, self.parameters = dtype, [], [], []
        for kind in (Stepper, FlatStepper):
            parameters = [nn.Parameter(value.clone()) for value in values]
            parts = [
                {"params": parameters[:2], "weight_decay": 0.01},
                {"params": []},
                {"params": parameters[2:]},
            ]
            base = make(parts if groups else parameters)
            if groups:
                base.param_groups[2]["lr"] = base.param_groups[2]["lr"] * 0.5
            schedule = ExponentialLR(base, 0.9) if scheduler else None
            self.bases.append(base)
            self.parameters.append(parameters)
            self.steppers.append(kind(base, ParameterVector(parameters), schedule))

    @property
    def is_flat(self):
        return self.steppers[1]._is_ahead

    def each(self, action):
        for stepper, base, parameters in zip(self.steppers, self.bases, self.parameters, strict=True):
            action(stepper, base, parameters)

    def step(self, count=1):
        for _ in range(count):
            gradient = torch.randn(DIMENSION, generator=self.generator, dtype=self.dtype)
            before = gradient.clone()
            for stepper in self.steppers:
                stepper.step(gradient)
            assert torch.equal(gradient, before)
            self.assert_points()

    def assert_points(self):
        plain, walked = (stepper.point for stepper in self.steppers)
        eps = torch.finfo(self.dtype).eps
        assert torch.allclose(walked, plain, rtol=1e4 * eps, atol=1e4 * eps)
        assert self.steppers[0].taken == self.steppers[1].taken

    def mark(self):
        self.each(lambda stepper, *_: stepper.mark())
        self.assert_points()

    def rewind(self):
        self.each(lambda stepper, *_: stepper.rewind())
        self.assert_points()

    def settle(self):
        self.each(lambda stepper, *_: stepper.settle())
        self.assert_same()

    def round(self, drafted=3, kept=2):
        self.mark()
        self.step(drafted)
        self.rewind()
        self.step(kept)
        self.settle()

    def assert_same(self):
        """What the user sees: parameters, gradients, state, settings."""
        self.assert_points()
        (plain, ps), (walked, qs) = zip(self.bases, self.parameters, strict=True)
        assert_close_trees(plain.state_dict(), walked.state_dict())
        for p, q in zip(ps, qs, strict=True):
            if self.steppers[0].taken == 0:
                continue
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


def assert_close_trees(left, right):
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        rounding = 1e-4 if left.dtype == torch.float32 else 1e-12
        assert torch.allclose(right, left, rtol=rounding, atol=rounding)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key, value in left.items():
            assert_close_trees(value, right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_close_trees(one, other)
    else:
        assert left == right


def test_all_elementwise_optimizers_are_tried():
    assert {type(BASES[name]([nn.Parameter(torch.ones(2))])) for name in FLAT} == ELEMENTWISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("name", FLAT)
def test_rounds_are_the_plain_steppers(name, in_pieces, dtype, monkeypatch):
    monkeypatch.setattr(flat, "_LONGEST", 5 if in_pieces else 1 << 17)
    twins = Twins(BASES[name], groups=not in_pieces, dtype=dtype)
    for _ in range(3):
        twins.mark()
        assert twins.is_flat
        twins.round()


@pytest.mark.parametrize(
    "setting", [{"maximize": True}, {"foreach": True}, {"maximize": True, "foreach": True}]
)
@pytest.mark.parametrize("kind", sorted(ELEMENTWISE, key=str))
def test_settings_that_change_gradients_in_place(kind, setting):
    twins = Twins(lambda parts: kind(parts, lr=0.01, **setting))
    for _ in range(2):
        twins.round()


def test_the_base_optimizer_stays_at_the_mark_until_it_is_settled():
    twins = Twins(BASES["adam"])
    twins.round()
    walked = twins.steppers[1]
    before = copy.deepcopy((twins.bases[1].state_dict()["state"], twins.parameters[1]))
    twins.mark()
    twins.step(2)
    after = twins.bases[1].state_dict()["state"], twins.parameters[1]
    assert_equal_trees(list(before), list(after))
    walked.take_back()
    assert_equal_trees(list(before), list(after))


def test_vanilla_state_stays_empty_until_a_step_is_kept():
    twins = Twins(BASES["sgd"])
    twins.round()
    assert not twins.bases[1].state
    twins = Twins(BASES["adam"])
    twins.mark()
    twins.step()
    twins.rewind()
    twins.settle()
    assert not twins.bases[1].state


@pytest.mark.parametrize("rounds", [0, 2])
def test_back_to_the_mark_from_wherever_it_is(rounds):
    twins = Twins(BASES["adam"])
    for _ in range(rounds):
        twins.round()
    start = copy.deepcopy((twins.bases[1].state_dict(), twins.parameters[1]))
    for way in ("rewind", "take_back"):
        twins.mark()
        twins.step(2)
        twins.settle()
        twins.each(lambda stepper, *_, way=way: getattr(stepper, way)())
        assert_equal_trees(list(start), [twins.bases[1].state_dict(), twins.parameters[1]])
        twins.assert_points()
    twins.round()


def test_steps_go_on_behind_what_was_settled():
    twins = Twins(BASES["nadam"])
    for _ in range(2):
        twins.mark()
        twins.step(2)
        twins.settle()
        twins.step(2)  # on the base optimizer itself
        twins.assert_same()
        twins.rewind()
        twins.step(3)
        twins.mark()  # here, steps and all
        twins.assert_same()
        twins.step()
        twins.rewind()
        twins.settle()


@pytest.mark.parametrize("name", ["momentum", "adam", "asgd", "adagrad"])
def test_states_are_saved_and_loaded_in_the_middle(name):
    twins, saved = Twins(BASES[name]), []
    twins.round()
    twins.mark()
    twins.step()
    twins.each(lambda stepper, *_: saved.append(copy.deepcopy(stepper.state_dict())))
    assert_close_trees(*saved)
    twins.step()
    twins.settle()
    twins.each(lambda stepper, *_: stepper.load_state_dict(copy.deepcopy(saved[0])))
    twins.each(lambda stepper, *_: stepper.check_step())
    for _ in range(2):
        twins.round()


def test_a_load_is_put_back():
    twins, ways = Twins(BASES["adam"]), []
    twins.round()
    saved = copy.deepcopy(twins.bases[0].state_dict())
    twins.round()
    before = copy.deepcopy(twins.bases[1].state_dict())
    twins.each(lambda stepper, *_: ways.append(stepper.held()))
    twins.each(lambda stepper, *_: stepper.load_state_dict(copy.deepcopy(saved)))
    for way in ways:
        way()
    assert_equal_trees(twins.bases[1].state_dict(), before)
    twins.round()


@torch.no_grad()
def _edit_parameters(stepper, base, parameters):
    parameters[0].data.mul_(2)
    parameters[3].data = torch.ones_like(parameters[3])


def _edit_state(stepper, base, parameters):
    base.state[parameters[2]]["exp_avg"].zero_()
    base.state[parameters[4]]["exp_avg_sq"] = torch.ones_like(parameters[4])


def _edit_rates(stepper, base, parameters):
    base.param_groups[0]["lr"] = 0.3
    base.param_groups[2]["betas"] = (0.5, 0.9)


def _forget(stepper, base, parameters):
    base.state.clear()


def _count_apart(stepper, base, parameters):
    base.state[parameters[3]]["step"] += 5


def _lose_one(stepper, base, parameters):
    del base.state[parameters[3]]


def _move(stepper, base, parameters):
    stepper.move_to(torch.linspace(-1, 1, DIMENSION, dtype=torch.float64))


def _step_plainly(stepper, base, parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)
    stepper.step_with_current_gradients()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(
    ("edit", "is_flat"),
    [
        (_edit_parameters, True),
        (_edit_state, True),
        (_edit_rates, True),
        (_forget, True),
        (_move, True),
        (_step_plainly, True),
        (_count_apart, False),
        (_lose_one, False),
    ],
)
def test_what_is_edited_between_rounds_counts(edit, is_flat, rounds):
    twins = Twins(BASES["adam"])
    for _ in range(rounds):
        twins.round()
    twins.each(edit)
    for _ in range(2):
        twins.mark()
        assert twins.is_flat == is_flat
        twins.round()


def test_moves_and_steps_with_given_gradients_in_the_middle():
    for edit in (_move, _step_plainly):
        twins = Twins(BASES["adam"])
        twins.round()
        twins.mark()
        twins.step(2)
        twins.each(edit)
        twins.assert_points()
        twins.step()
        twins.settle()
        twins.rewind()
        twins.round()


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_added_between_rounds_run_at_every_step(register):
    twins, seen = Twins(BASES["adam"]), ([], [])
    twins.round()
    handles = [
        getattr(base, register)(lambda *_, calls=calls: calls.append(1))
        for base, calls in zip(twins.bases, seen, strict=True)
    ]
    twins.round(3, 2)
    assert len(seen[0]) == len(seen[1]) == 5
    for handle in handles:
        handle.remove()
    twins.mark()
    assert twins.is_flat


def test_a_step_of_the_users_making_is_called():
    twins, calls = Twins(BASES["sgd"], scheduler=False), []
    twins.round()
    base = twins.bases[1]
    plain = base.step
    base.step = lambda: calls.append(1) or plain()
    twins.round(3, 2)
    assert len(calls) == 5


def test_parameters_without_gradients_are_left_alone():
    twins = Twins(BASES["adam"])
    twins.round()
    mask = (True, False, True, True, False, True)
    twins.mark()
    twins.step()
    twins.rewind()
    twins.each(lambda stepper, *_: setattr(stepper, "mask", mask))  # as a round does
    twins.step(2)
    twins.settle()
    twins.round()
    twins.each(lambda stepper, *_: setattr(stepper, "mask", (True,) * len(SHAPES)))
    twins.round()  # with counters that differ
    assert not twins.is_flat


@pytest.mark.parametrize("kind", ["dtype", "layout", "subclass", "attribute"])
def test_what_one_tensor_cannot_stand_for_goes_the_plain_way(kind):
    parameters = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    if kind == "dtype":
        parameters[1] = nn.Parameter(torch.ones(2, dtype=torch.float64))
    elif kind == "layout":
        parameters[1] = nn.Parameter(torch.ones(3, 4).t())
    elif kind == "subclass":
        parameters[1] = type("Special", (nn.Parameter,), {})(torch.ones(3))
    base = torch.optim.Adam(parameters)
    if kind == "attribute":
        base.calls = 0  # pyright: ignore[reportAttributeAccessIssue]
    stepper = FlatStepper(base, ParameterVector(parameters))
    stepper.mark()
    stepper.step(torch.ones(stepper.vector.dimension, dtype=stepper.vector.dtype))
    assert all((p != 1).all() for p in parameters)


def test_copies_step_by_themselves():
    twins = Twins(BASES["adam"], scheduler=False)
    twins.round()
    walked = copy.deepcopy(twins.steppers[1])
    before = twins.steppers[1].point
    walked.mark()
    walked.step(torch.ones(DIMENSION, dtype=torch.float64))
    walked.settle()
    assert torch.equal(twins.steppers[1].point, before)
    assert not torch.equal(walked.point, before)
    twins.round()


# ---------------------------------------------------------------- through OptEx


def run(name, is_flat, monkeypatch, **settings):
    """A run's reports, parameters and base state."""
    monkeypatch.setattr("optex.distributed.layout.FlatStepper", FlatStepper if is_flat else Stepper)
    model = network()
    base = BASES[name](model.parameters())
    optimizer = OptEx(base, scheduler=ExponentialLR(base, 0.99), parallelism=3, **settings)
    assert isinstance(optimizer.stepper, FlatStepper) == is_flat
    kept = [report.accepted for report in optimizer.rounds(regression_batches(24), squared_error(model))]
    return kept, list(model.parameters()), base.state_dict()


@pytest.mark.parametrize("acceptance", [None, Last()], ids=["default", "last"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "rprop"])
def test_runs_are_those_on_the_plain_stepper(name, acceptance, monkeypatch):
    plain = run(name, False, monkeypatch, acceptance=acceptance)
    walked = run(name, True, monkeypatch, acceptance=acceptance)
    assert_close_trees(plain[0], walked[0])
    torch.testing.assert_close(walked[1], plain[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(walked[2]["state"], plain[2]["state"], rtol=1e-9, atol=1e-12)


def test_where_bits_are_promised_steps_are_plain():
    def stepper(**settings):
        return type(OptEx(torch.optim.Adam(network().parameters()), **settings).stepper)

    assert stepper() is FlatStepper
    assert stepper(acceptance=WithinTolerance(0.0)) is Stepper
    assert stepper(parallelism=1, stride=1) is Stepper
    assert stepper(parallelism=1) is FlatStepper


def test_an_interrupted_round_leaves_its_start():
    model = network()
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), parallelism=3)
    batches, objective = regression_batches(30), squared_error(model)
    for _ in itertools.islice(optimizer.rounds(batches, objective), 4):
        pass
    before = copy.deepcopy((list(model.parameters()), optimizer.base.state_dict()))
    calls = itertools.count()

    def interrupted(batch):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return objective(batch)

    with pytest.raises(KeyboardInterrupt):
        next(optimizer.rounds(batches, interrupted))
    assert_equal_trees(list(before), [list(model.parameters()), optimizer.base.state_dict()])
    next(optimizer.rounds(batches, objective))
