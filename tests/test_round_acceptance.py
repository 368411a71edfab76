"""Which steps are kept, rule by rule and number by number."""

import contextlib
import math
import re

import pytest
import torch

from optex import GradientHistory, Last, LowestLoss, SmallestGradient, WithinTolerance
from optex.round import RoundRecord
from optex.round.acceptance import SELECTIONS
from optex.round.surprise import Surprises
from optex.sources import ObjectiveSource
from optex.stepping import ParameterVector, Stepper
from optex.vector_space import VectorSpace
from tests.test_acceptance import measured_round

SPACE = VectorSpace(1)


def exactly(message):
    return f"^{re.escape(message)}$"


class Logged(torch.optim.SGD):
    """SGD of rate 1 that notes what is asked of it, frozen or not."""

    needs_graph = False

    def __init__(self, theta):
        super().__init__([theta], lr=1.0)
        self.log, self._frozen = [], False

    @contextlib.contextmanager
    def drafting(self):
        self._frozen = True
        yield
        self._frozen = False

    def observe(self):
        return None

    def recall(self, observation):
        self.log.append(observation)

    def step(self, closure=None):
        gradient = self.param_groups[0]["params"][0].grad
        self.log.append(("draft" if self._frozen else "step", gradient.item()))
        super().step(closure)


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def record_of(proxies, gradients, *, positions=None, steps=None, deterministic=False, usable=None):
    """A round in one dimension from 0, where all steps have rate 1."""
    theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = Stepper(Logged(theta), ParameterVector([theta]))
    positions = range(len(proxies)) if positions is None else positions
    steps = len(positions) if steps is None else steps
    source = ObjectiveSource(torch.sum, deterministic=deterministic)
    record = RoundRecord(0, source, [], steps, positions, stepper, SPACE, None)
    record.proxies, record.gradients = column(proxies), column(gradients)
    record.usable = [True] * len(proxies) if usable is None else usable
    record.observations = [f"seen {row}" for row in range(len(proxies))]
    return record


def log_of(record):
    return record.stepper._base.log


# ---------------------------------------------------------------------- the paper's rules


def test_selections_have_their_names():
    assert {"last": Last, "lowest-loss": LowestLoss, "smallest-gradient": SmallestGradient} == SELECTIONS


@pytest.mark.parametrize("kind", [Last, LowestLoss, SmallestGradient])
def test_a_selection_uses_its_window_up_and_takes_what_is_finite(kind):
    rule = kind()
    assert not rule.keeps_window
    assert not rule.strides
    assert rule.ahead(5) == 5
    assert rule.evaluated(3) == range(3)
    assert rule.plausible(column([1.0, 1e9, 0.0]), SPACE).tolist() == [True] * 3
    assert rule.state_dict() == {}
    rule.load_state_dict({})


def test_rules_are_named():
    assert repr(LowestLoss()) == "LowestLoss()"
    assert repr(Last()) == "Last('all')"
    assert repr(Last("last")) == "Last('last')"
    assert repr(WithinTolerance(1.23456)) == "WithinTolerance(1.23, adaptive=True)"
    assert repr(WithinTolerance(0.0)) == "WithinTolerance(0, adaptive=False)"


def test_the_last_alone_is_evaluated_where_that_is_asked_for():
    assert Last("last").evaluated(4) == range(3, 4)
    with pytest.raises(ValueError, match=exactly("Last: evaluate must be 'all' or 'last', got 'first'")):
        Last("first")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("usable", "last", "lowest", "smallest"),
    [
        ([True, True, True, True], 3, 1, 2),
        ([True, True, True, False], 2, 1, 2),
        ([True, False, False, True], 3, 0, 0),
        ([False, False, False, True], 3, 3, 3),
    ],
)
def test_the_best_of_what_is_usable_is_chosen(usable, last, lowest, smallest):
    record = record_of([0.0, 1.0, 2.0, 3.0], [-2.0, 5.0, 1.0, 8.0], usable=usable)
    record.losses = torch.tensor([3.0, 1.0, math.nan, 4.0]).nan_to_num(2.0)
    assert Last().choose(record) == last
    assert LowestLoss().choose(record) == lowest
    assert SmallestGradient().choose(record) == smallest


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_the_chosen_proxy_is_reached_by_drafted_steps_and_left_by_a_true_one(chosen, ahead):
    record = record_of([0.0, -1.0, -3.0, -7.0], [10.0, 20.0, 30.0, 40.0])
    record.drafted = column([1.0, 2.0, 4.0, 8.0])
    record.usable = [i <= chosen for i in range(4)]
    stepper = record.stepper
    with stepper.drafting():
        for gradient in record.drafted[:ahead]:
            stepper.step(gradient)
    log_of(record).clear()
    assert Last().replay(record) == chosen + 1
    drafted = [("draft", float(2**i)) for i in range(chosen)] if ahead != chosen else []
    assert log_of(record) == [*drafted, f"seen {chosen}", ("step", 10.0 * (chosen + 1))]
    assert stepper.point.item() == -(2**chosen - 1) - 10 * (chosen + 1)


# ---------------------------------------------------------------------- arguments and states


def test_defaults():
    rule = WithinTolerance()
    assert (rule.tolerance, rule.adaptive, rule.error) == (2.0, True, 0.5)
    assert (rule.lowest, rule.highest, rule.absurd, rule.lookahead) == (0.1, 32.0, 20.0, None)
    assert rule.keeps_window
    assert rule.strides
    assert not WithinTolerance(0.0).strides
    assert rule.state_dict() == {"tolerance": 2.0, "kept": None, "length": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -1e-9}, "tolerance must not be negative, got -1e-09"),
        ({"tolerance": math.nan}, "tolerance must not be negative, got nan"),
        (
            {"absurd": 0.99},
            "absurd must be at least 1, or step 0's own gradient would count as implausible, got 0.99",
        ),
        ({"error": 0.0}, "error must be positive, got 0.0"),
        ({"lowest": 0.0}, "needs 0 < lowest <= highest, got 0.0 and 32.0"),
        ({"lowest": 2.0, "highest": 1.0}, "needs 0 < lowest <= highest, got 2.0 and 1.0"),
        ({"lookahead": 0.5}, "lookahead must be at least 1 and finite, or None, got 0.5"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=exactly(f"WithinTolerance: {message}")):
        WithinTolerance(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"tolerance": 0.0},
        {"tolerance": math.inf},
        {"absurd": 1.0},
        {"error": 0.5},
        {"lowest": 0.5, "highest": 0.5},
        {"lookahead": 1.0},
    ],
)
def test_arguments_at_the_ends_of_their_range_are_taken(settings):
    rule = WithinTolerance(**settings)
    for name, value in settings.items():
        assert getattr(rule, name) == value


def test_any_tolerance_but_0_is_adapted():
    assert WithinTolerance(0.25).adaptive
    assert not WithinTolerance(0.25, adaptive=False).adaptive
    assert not WithinTolerance(0.0).adaptive


def test_states_go_round():
    rule = WithinTolerance(3.0)
    for state in ({"tolerance": 0.5, "kept": 4, "length": 0.25}, {"tolerance": 1, "kept": None, "length": 0}):
        rule.load_state_dict(state)
        assert rule.state_dict() == state
    fixed = WithinTolerance(0.0)
    fixed.load_state_dict({"tolerance": 0.0, "kept": 1, "length": 0.0})


@pytest.mark.parametrize(
    ("tolerance", "change", "message"),
    [
        (2.0, {"tolerance": -1.0}, "saved tolerance must be a number of at least 0, got -1.0"),
        (2.0, {"kept": -1}, "saved kept must be an integer of at least 0, got -1"),
        (2.0, {"length": -1.0}, "saved length must be a number of at least 0, got -1.0"),
        (2.0, {"tolerance": 0.0}, "saved tolerance is 0, this rule's 2; 0 stays 0"),
        (0.0, {"tolerance": 1.5}, "saved tolerance is 1.5, this rule's 0; 0 stays 0"),
    ],
)
def test_states_of_another_rule_are_refused_by_name(tolerance, change, message):
    rule = WithinTolerance(tolerance)
    before = rule.state_dict()
    with pytest.raises(ValueError, match=exactly(f"WithinTolerance.load_state_dict: {message}")):
        rule.load_state_dict({"tolerance": 1.0, "kept": 2, "length": 0.5} | change)
    assert rule.state_dict() == before


@pytest.mark.parametrize("entry", ["tolerance", "kept", "length"])
def test_an_entry_that_is_missing_is_named(entry):
    state = WithinTolerance().state_dict()
    del state[entry]
    with pytest.raises(
        ValueError, match=f"^WithinTolerance.load_state_dict: the saved state has no entry '{entry}'"
    ):
        WithinTolerance().load_state_dict(state)


def test_a_fixed_tolerance_looks_ahead_at_all():
    rule = WithinTolerance(lookahead=None)
    rule.load_state_dict({"tolerance": 2.0, "kept": 1, "length": 0.0})
    assert rule.ahead(9) == 9


# ---------------------------------------------------------------------- plausible gradients


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([1.0, 19.0, -20.0, 20.5], [True, True, True, False]),
        ([0.5, 10.0, 10.5], [True, True, False]),
        ([1.0, 25.0], [True, False]),
        ([0.0, 0.0, 1e-300], [True, True, False]),
        ([math.nan, 1.0, 1e9], [True, True, True]),  # nothing to measure by
        ([math.inf, 1.0, 1e9], [True, True, True]),
        ([1.0, math.nan, math.inf], [True, False, False]),
        ([math.nan], [True]),
    ],
)
def test_gradients_much_longer_than_the_first_are_implausible(gradients, expected):
    found = WithinTolerance().plausible(column(gradients), SPACE)
    assert found.dtype == torch.bool
    assert found.tolist() == expected


# ---------------------------------------------------------------------- the walk


def kept(record, tolerance=2.0):
    rule = WithinTolerance(tolerance, adaptive=False)
    accepted = rule.replay(record)
    assert rule.state_dict()["kept"] == accepted == record.stepper.taken
    return accepted


def test_a_draft_is_rewound_before_it_is_replayed():
    record = record_of([0.0, -1.0], [1.0, 1.0])
    record.stepper.step(column([5.0])[0])
    assert kept(record) == 2
    assert record.stepper.point.item() == -2.0


def test_each_measured_step_recalls_its_own_evaluation():
    record = record_of([0.0, -1.0, -2.0], [1.0, 1.0, 1.0])
    assert kept(record) == 3
    expected = [entry for row in range(3) for entry in (f"seen {row}", ("step", 1.0))]
    assert log_of(record) == expected


@pytest.mark.parametrize(("gap", "accepted"), [(2.0, 2), (2.01, 1), (math.nan, 1)])
def test_a_gradient_is_used_as_far_from_its_place_as_the_tolerance_allows(gap, accepted):
    assert kept(record_of([0.0, -1.0 + gap], [1.0, 1.0])) == accepted


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("usable", "accepted"), [([True, False, True], 1), ([True, True, False], 2)])
def test_a_step_whose_own_gradient_is_not_usable_ends_the_round(usable, accepted, deterministic):
    record = record_of([0.0, -1.0, -2.0], [1.0, 1.0, 1.0], usable=usable, deterministic=deterministic)
    assert kept(record, 100.0) == accepted


@pytest.mark.parametrize(("tolerance", "accepted"), [(2.0, 2), (3.0, 3), (4.0, 4), (9.0, 8)])
def test_a_single_gradient_serves_four_fifths_of_the_tolerance(tolerance, accepted):
    # Step i is i steps behind the only proxy: 0.8 times 2, 3, 4 and 9 are 1.6, 2.4, 3.2 and 7.2.
    record = record_of([0.0], [1.0], positions=[0], steps=12, deterministic=True)
    assert kept(record, tolerance) == accepted
    assert record.stepper.point.item() == -accepted


@pytest.mark.parametrize(("tolerance", "accepted"), [(1.0, 5), (0.72, 5), (0.7, 1), (1.43, 6), (3.0, 7)])
def test_between_gradients_the_tolerance_is_longer(tolerance, accepted):
    # Proxies at steps 0 and 3; the steps behind it are 1, 2, 3 from the nearest, and 1.4 times as far may be.
    record = record_of([0.0, -3.0], [1.0, 1.0], positions=[0, 3], steps=7, deterministic=True)
    assert kept(record, tolerance) == accepted


def test_the_nearest_usable_gradient_serves_where_none_was_measured():
    # Gradients 1, 3 at 0, -3: the steps lead to -1, -2, -5 and so on.
    record = record_of([0.0, -2.25], [1.0, 3.0], positions=[0, 3], steps=4, deterministic=True)
    assert kept(record, 100.0) == 4
    assert [entry[1] for entry in log_of(record) if entry[0] in ("step", "draft")] == [1.0, 1.0, 3.0, 3.0]
    assert log_of(record)[0] == "seen 0"
    record = record_of(
        [0.0, -2.25, -2.5],
        [1.0, 3.0, 9.0],
        positions=[0, 3, 5],
        steps=3,
        deterministic=True,
        usable=[True, False, True],
    )
    assert kept(record, 100.0) == 3
    assert [entry[1] for entry in log_of(record) if entry[0] in ("step", "draft")] == [1.0, 1.0, 9.0]


def test_a_base_whose_every_step_is_measured_has_the_tolerance_itself():
    record = record_of([0.0, -1.0 + 2.2], [1.0, 1.0], deterministic=True)
    assert kept(record) == 1


# ---------------------------------------------------------------------- sampled steps in between


class Predicting:
    """A posterior that predicts one number, further along each time."""

    def __init__(self, *values):
        self._values, self.history = iter(values), GradientHistory(2, 1)

    def mean(self, point):
        return torch.full_like(point, next(self._values))


def sampled_record(posterior, *, length=1.0, positions=(0, 4)):
    record = record_of(
        [0.0, -4.0][: len(positions)], [1.0, 1.0][: len(positions)], positions=positions, steps=5
    )
    record.posterior = posterior
    products = [length**2 * (1 - 0.8**5), 0.0, 1.0, 1.0]
    record.surprises = Surprises.loaded({"products": products, "rounds": 5})
    return record


@pytest.mark.parametrize(
    ("values", "accepted", "end"),
    [
        ((1.0, 1.0, 1.0), 5, -5.0),
        ((0.5, 1.5, 1.0), 5, -5.0),
        ((1.0, 1.51, 1.0), 2, -2.0),  # half as long again as predictions were is too long
        ((-1.51,), 1, -1.0),
        ((math.nan,), 1, -1.0),
    ],
)
def test_steps_without_a_minibatch_take_predictions_of_the_usual_length(values, accepted, end):
    record = sampled_record(Predicting(*values))
    assert kept(record) == accepted
    assert record.stepper.point.item() == end
    predicted = [("draft", value) for value in values[: min(accepted - 1, 3)]]
    assert log_of(record)[2 : 2 + len(predicted)] == predicted


@pytest.mark.parametrize(("value", "accepted"), [(2.9, 2), (3.1, 1)])
def test_the_usual_length_is_that_of_earlier_predictions(value, accepted):
    # Proxies at 0 and -4: the steps behind a prediction of -2.9 are too far from the second one.
    record = sampled_record(Predicting(value, math.nan), length=2.0)
    assert kept(record) == accepted


def test_where_nothing_predicts_the_round_ends_with_what_was_measured():
    assert kept(sampled_record(None)) == 1


# ---------------------------------------------------------------------- what goes wrong


def test_steps_that_are_not_finite_leave_the_exact_first_one():
    record = record_of([0.0, -1.0], [1.0, math.inf])
    assert kept(record) == 1
    assert record.stepper.point.item() == -1.0
    assert log_of(record)[-2:] == ["seen 0", ("step", 1.0)]


# ---------------------------------------------------------------------- what the tolerance learns from


def test_a_round_of_one_gradient_notes_how_long_its_steps_were():
    record = record_of([0.0], [3.0], positions=[0], steps=3, deterministic=True)
    record.predicted = [0]
    rule = WithinTolerance(10.0, adaptive=False)
    assert rule.replay(record) == 3
    assert rule.state_dict()["length"] == 3.0
    record = record_of([0.0], [5.0], positions=[0], steps=1)
    rule.replay(record)  # nothing predicted: nothing noted
    assert rule.state_dict()["length"] == 3.0
    record = record_of([0.0, -5.0], [5.0, 5.0])
    record.predicted = [0]
    rule.replay(record)  # several gradients: the draft tells
    assert rule.state_dict()["length"] == 3.0


def test_steps_are_measured_from_where_the_round_began():
    record = record_of([5.0], [3.0], positions=[0], steps=2, deterministic=True)
    record.stepper.move_to(torch.full((1,), 5.0, dtype=torch.float64))
    record.stepper.mark()
    record.predicted = [0]
    rule = WithinTolerance(10.0, adaptive=False)
    assert rule.replay(record) == 2
    assert rule.state_dict()["length"] == 3.0


def learned(record, **settings):
    rule = WithinTolerance(**settings)
    rule._learn(record)
    return rule.tolerance


def test_evidence_of_a_single_gradient_is_measured_in_the_last_rounds_steps():
    record = record_of([0.0], [1.0], positions=[0])
    record.drafted, record.evaluated, record.predicted = column([1.5]), range(1), [0]
    record.distances = [torch.tensor(4.0, dtype=torch.float64)]
    rule = WithinTolerance(2.0)
    rule.load_state_dict({"tolerance": 2.0, "kept": 1, "length": 4.0})
    rule._learn(record)  # wrong by the bearable half at one step
    assert rule.tolerance == 1.0


def test_steps_between_evaluated_ones_are_a_part_of_the_way():
    # Proxies 1 apart and four steps between them: a distance of 1 is four steps.
    record = measured_round([1.0], [0.5])
    record.positions = [0, 4]
    assert learned(record, tolerance=4.0) == 4.0
    record.positions = [0, 2]
    assert learned(record, tolerance=4.0) == 2.0


def test_each_step_of_the_draft_has_a_length_of_its_own():
    # Behind row 0 the proxies are 4 apart, two steps a gap; behind row 1 they are 3, with one step.
    record = measured_round([1.0, 1.0], [0.5, 0.5])
    record.proxies, record.positions = column([0.0, 4.0, 7.0]), [0, 2, 3]
    # Bearable are a half and a third of a step; the median is between them.
    assert learned(record) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_errors_are_relative_to_the_gradients():
    record = measured_round([1.0], [0.5])
    record.gradients, record.drafted = 4 * record.gradients, 4 * record.drafted
    assert learned(record) == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"error": 0.25}, 0.5),
        ({"lowest": 1.5}, 1.5),
        ({"highest": 0.75}, 0.75),
        ({"tolerance": 0.25}, 0.5),  # half way, in logarithms, up to 1
    ],
)
def test_settings_bound_what_is_learned(settings, expected):
    assert learned(measured_round([1.0], [0.5]), **settings) == pytest.approx(expected)


def test_a_prediction_that_was_exact_counts_as_nearly_so():
    # 1 step at an error of 1e-12: bearable up to the bound.
    assert learned(measured_round([1.0], [0.0]), highest=1e30, tolerance=1.0) == pytest.approx(0.5e12**0.5)


@pytest.mark.parametrize(("distance", "expected"), [(0.9e-6, 2.0), (1.1e-6, 0.1), (math.inf, 2.0)])
def test_distances_of_rounding_are_no_evidence(distance, expected):
    assert learned(measured_round([distance], [1.0])) == expected


def test_errors_that_are_no_numbers_are_no_evidence():
    record = measured_round([1.0, 1.0], [math.nan, 0.5])
    assert learned(record) == 1.0


def test_rounds_teach_before_they_are_taken():
    record = record_of([0.0, -1.0], [1.0, 1.0])
    record.drafted, record.evaluated, record.predicted = column([1.5, 1.5]), range(2), [0]
    record.distances = [torch.tensor(1.0, dtype=torch.float64), None]
    record.stepper.step(column([1.0])[0])
    rule = WithinTolerance()
    assert rule.replay(record) == 2
    assert rule.tolerance == 1.0
    fixed = WithinTolerance(adaptive=False)
    record.stepper.rewind()
    fixed.replay(record)
    assert fixed.tolerance == 2.0
