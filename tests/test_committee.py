import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from optex import CommitteeEstimator, CurlFreeEstimator, GradientHistory, HoldLast, SeparableEstimator
from optex.errors import NotPositiveDefiniteError
from optex.estimators.arrivals import Arrivals
from optex.estimators.committee import HANDICAP, YOUNG, default_members
from optex.estimators.interface import Coefficients
from optex.estimators.kernels import kernel_named
from tests.models import assert_equal_trees


def rows(count, dimension=6, seed=0):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(gradient, count=12):
    history, points = GradientHistory(count, 6), rows(count)
    history.append(points, gradient(points))
    return history


def judge(committee, history, points, gradients, held):
    committee.judge(committee.fit(history), Arrivals(history, points, gradients), held)


def test_predicts_with_its_best_member():
    history = filled(lambda x: x)
    members = (CurlFreeEstimator(), SeparableEstimator(), HoldLast())
    committee, query = CommitteeEstimator(members), rows(2, seed=9)
    for best in range(3):
        committee.scores = torch.ones(3, dtype=torch.float64)
        committee.scores[best] = 0
        expected, posterior = members[best].fit(history), committee.fit(history)
        assert torch.equal(posterior.mean(query[0]), expected.mean(query[0]))
        assert torch.equal(posterior.mean_difference(*query), expected.mean_difference(*query))
        assert posterior.variance(query[0]) == expected.variance(query[0])


def test_scores_are_those_of_the_formula():
    history = filled(lambda x: x)
    members = (CurlFreeEstimator(), HoldLast())
    committee = CommitteeEstimator(members, memory=0.6)
    committee.scores = torch.tensor([0.3, 0.1], dtype=torch.float64)
    points, gradients = rows(3, seed=5), rows(3, seed=6)
    origin = rows(1, seed=7)[0], rows(1, seed=8)[0]
    judge(committee, history, points, gradients, [None, origin, None])
    errors = []
    for member in members:
        posterior = member.fit(history)
        predictions = [posterior.mean(point) for point in points]
        predictions[1] = origin[1] + posterior.mean(points[1]) - posterior.mean(origin[0])
        errors.append([(p - g).norm().log().item() for p, g in zip(predictions, gradients, strict=True)])
    errors = torch.tensor(errors, dtype=torch.float64)
    excess = (errors - errors.amin(0)).mean(1)
    expected = 0.6 * torch.tensor([0.3, 0.1], dtype=torch.float64) + 0.4 * excess
    torch.testing.assert_close(committee.scores, expected)


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        (lambda x: x, 0),
        (lambda x: torch.zeros_like(x) + torch.arange(6.0), 1),
    ],
    ids=["linear", "constant"],
)
def test_finds_the_member_that_fits(gradient, expected):
    # A zero mean falls off away from the data; holding the last gradient is exact where it is constant.
    committee = CommitteeEstimator([CurlFreeEstimator(prior_mean="zero"), HoldLast()], interval=1)
    history = filled(gradient)
    for seed in range(5):
        points = rows(4, seed=seed + 20)
        judge(committee, history, points, gradient(points), [None] * 4)
    assert committee.best(history) == expected


def test_noise_calls_for_the_member_that_smooths():
    generator = torch.Generator().manual_seed(3)
    noisy = lambda x: x + torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    committee = CommitteeEstimator(interval=1)
    history = filled(noisy)
    for seed in range(12):
        history, points = filled(noisy), 0.3 * rows(4, seed=seed + 20)
        judge(committee, history, points, noisy(points), [None] * 4)
    assert default_members()[committee.best(history)].assumed_noise_variance >= 1e-2


@dataclass(frozen=True)
class Failing(HoldLast):
    """Predicts what is no number while the others do what they can."""

    value: float = math.nan

    def fit(self, history):
        posterior = super().fit(history)
        weights = np.full((2, history.size), self.value)
        posterior.coefficients = lambda locations: Coefficients(weights)
        return posterior


def test_a_member_that_fails_to_predict_is_never_chosen():
    committee, history = CommitteeEstimator([Failing(math.inf), CurlFreeEstimator()]), filled(lambda x: x)
    judge(committee, history, rows(2), rows(2), [None, None])
    assert committee.scores[0] == torch.inf


@pytest.mark.parametrize("memory", [0.0, 0.7])
def test_a_member_that_fails_alone_leaves_the_others_in_office(memory):
    committee = CommitteeEstimator([Failing(), CurlFreeEstimator(), HoldLast()], memory=memory, interval=1)
    history = filled(lambda x: x)
    for seed in range(2):
        points = rows(2, seed=seed + 20)
        judge(committee, history, points, points, [None, None])
        assert committee.scores[0] == torch.inf
        assert committee.scores[1:].isfinite().all()
        assert committee.best(history) == 1


def test_judges_every_interval_from_the_first_round_on():
    committee, history = CommitteeEstimator([HoldLast(), CurlFreeEstimator()], interval=3), filled(lambda x: x)
    seen = []
    for seed in range(7):
        before = committee.scores.clone()
        judge(committee, history, rows(2, seed=seed + 30), rows(2, seed=seed + 40), [None, None])
        seen.append(not torch.equal(before, committee.scores))
    assert seen == [True, False, False, True, False, False, True]


def test_minibatches_are_judged_every_round_while_they_are_new():
    committee = CommitteeEstimator([HoldLast(), CurlFreeEstimator()], interval=5)
    history, seen = filled(lambda x: x), []
    history.append(rows(1, seed=9), rows(1, seed=9), [math.nan])
    for seed in range(2 * YOUNG):
        before = committee.scores.clone()
        judge(committee, history, rows(2, seed=seed + 30), rows(2, seed=seed + 50), [None, None])
        if not torch.equal(before, committee.scores):
            seen.append(seed)
    assert seen == [*range(YOUNG), 10, 15]


def test_the_interval_goes_on_where_a_saved_run_stopped():
    history, seen = filled(lambda x: x), []
    committee = CommitteeEstimator([HoldLast(), CurlFreeEstimator()], interval=3)
    for seed in range(7):
        state = committee.state_dict()
        committee = CommitteeEstimator(committee.members, interval=3)
        committee.load_state_dict(state)
        before = committee.scores.clone()
        judge(committee, history, rows(2, seed=seed + 30), rows(2, seed=seed + 40), [None, None])
        seen.append(not torch.equal(before, committee.scores))
    assert seen == [True, False, False, True, False, False, True]


def test_rounds_that_were_not_judged_leave_the_handicap():
    committee, history = CommitteeEstimator(memory=0.5, interval=4), filled(lambda x: x)
    noises = [member.assumed_noise_variance for member in default_members()]
    noisiest = noises.index(max(noises))
    for seed in range(3):  # the first of them is judged
        judge(committee, history, rows(2, seed=seed), rows(2, seed=seed + 10), [None, None])
    history.append(rows(1, seed=9), rows(1, seed=9), [math.nan])
    twin = CommitteeEstimator(memory=0.5, interval=4)
    twin.load_state_dict(committee.state_dict())
    for each in (committee, twin):
        for score, expected in ((0.45, noisiest), (0.55, 0)):
            each.scores = torch.zeros_like(each.scores)
            each.scores[noisiest] = score * HANDICAP
            assert each.best(history) == expected


def test_with_noise_the_others_are_handicapped_for_a_while():
    committee, history = CommitteeEstimator(memory=0.5, interval=1), filled(lambda x: x)
    noises = [member.assumed_noise_variance for member in default_members()]
    noisiest = noises.index(max(noises))
    assert committee.best(history) == 0
    history.append(rows(1, seed=9), rows(1, seed=9), [math.nan])
    assert committee.best(history) == noisiest
    committee.scores[noisiest] = 0.5 * HANDICAP
    assert committee.best(history) == noisiest
    committee.scores[noisiest] = 1.5 * HANDICAP
    assert committee.best(history) == 0
    for seed in range(2):
        judge(committee, history, rows(2, seed=seed), rows(2, seed=seed + 10), [None, None])
    committee.scores = torch.zeros_like(committee.scores)
    committee.scores[noisiest] = 0.2 * HANDICAP
    assert committee.best(history) == noisiest
    committee.scores[noisiest] = 0.3 * HANDICAP  # two judgements have forgotten three quarters
    assert committee.best(history) == 0


def test_state_goes_round():
    committee, twin = CommitteeEstimator(), CommitteeEstimator()
    committee.scores = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin.load_state_dict(committee.state_dict())
    assert torch.equal(committee.scores, twin.scores)
    assert twin.state_dict()["judged"] == committee.state_dict()["judged"]
    twin.scores += 1
    assert not torch.equal(committee.scores, twin.scores)


def test_the_members_of_the_default():
    *models, last = default_members()
    assert last == HoldLast()
    settings = [
        (m.kernel, m.median_multiple, m.noise_variance, m.prior_mean)
        for m in models
        if isinstance(m, CurlFreeEstimator)
    ]
    rough, smooth = kernel_named("matern-5/2"), kernel_named("rbf")
    assert settings == [
        (rough, 10.0, 1e-6, "last"),
        (smooth, 3.0, 1e-9, "last"),
        (rough, 10.0, 1e-2, "last"),
        (rough, 10.0, 1e-1, "last"),
        (rough, 10.0, 1.0, "gls"),
    ]
    committee = CommitteeEstimator()
    assert committee.members == default_members()
    assert (committee.memory, committee.interval) == (0.7, 2)
    assert committee.scores.dtype == torch.float64
    assert committee._handicaps(filled(lambda x: x)).dtype == torch.float64


def test_a_committee_names_its_members():
    committee = CommitteeEstimator([HoldLast(), HoldLast()], memory=0.5, interval=3)
    assert repr(committee) == "CommitteeEstimator(HoldLast(), HoldLast(), memory=0.5, interval=3)"


def test_the_best_members_coefficients_are_the_committees():
    history = filled(lambda x: x)
    posterior = CommitteeEstimator([CurlFreeEstimator()]).fit(history)
    locations = posterior.locate(rows(2, seed=9))
    ours, own = (each.coefficients(locations) for each in (posterior, CurlFreeEstimator().fit(history)))
    np.testing.assert_array_equal(ours.on_gradients, own.on_gradients)
    np.testing.assert_array_equal(ours.on_displacements, own.on_displacements)
    np.testing.assert_array_equal(ours.on_offsets, own.on_offsets)


@dataclass(frozen=True)
class Unfit(HoldLast):
    """Cannot be fitted."""

    def fit(self, history):
        raise NotPositiveDefiniteError("no")


def test_a_member_that_cannot_be_fitted_holds_the_last_gradient():
    history, query = filled(lambda x: x), rows(1, seed=9)[0]
    posterior = CommitteeEstimator([Unfit()]).fit(history)
    assert torch.equal(posterior.mean(query), HoldLast().fit(history).mean(query))


def test_members_that_fail_together_are_all_out():
    committee, history = CommitteeEstimator([Failing(math.inf), Failing(math.nan)]), filled(lambda x: x)
    judge(committee, history, rows(2), rows(2), [None, None])
    assert committee.scores.tolist() == [math.inf, math.inf]


def test_nothing_is_judged_without_arrivals_or_by_anothers_posterior():
    committee, history = CommitteeEstimator(), filled(lambda x: x)
    before = committee.state_dict()
    judge(committee, history, rows(0), rows(0), [])
    committee.judge(HoldLast().fit(history), Arrivals(history, rows(1), rows(1, seed=3)), [None])
    assert_equal_trees(committee.state_dict(), before)


def test_a_saved_committee_is_taken_over_as_numbers_of_its_own():
    committee = CommitteeEstimator([HoldLast(), CurlFreeEstimator()])
    for dtype in (torch.float64, torch.float32):
        scores = torch.tensor([0.5, math.inf], dtype=dtype)
        committee.load_state_dict({"scores": scores, "rounds": 3, "judged": 2})
        scores.zero_()
        assert committee.scores.tolist() == [0.5, math.inf]
        assert committee.scores.dtype == torch.float64
        state = committee.state_dict()
        assert (state["rounds"], state["judged"]) == (3, 2)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "scores",
            torch.zeros(3),
            "saved scores must be a floating-point tensor (2,), got torch.float32 (3,)",
        ),
        ("scores", torch.tensor([0.0, math.nan]), "saved scores are not numbers"),
        ("rounds", -1, "saved rounds must be an integer of at least 0, got -1"),
        ("judged", None, "saved judged must be an integer of at least 0, got None"),
    ],
)
def test_what_is_no_saved_committee_is_refused_by_name(entry, value, message):
    committee = CommitteeEstimator([HoldLast(), CurlFreeEstimator()])
    before = committee.state_dict()
    owner = "CommitteeEstimator.load_state_dict"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{owner}: {message}')}$"):
        committee.load_state_dict({**before, entry: value})
    with pytest.raises(ValueError, match=f"^{re.escape(owner)}: the saved state has no entry '{entry}'"):
        committee.load_state_dict({name: before[name] for name in before if name != entry})
    assert_equal_trees(committee.state_dict(), before)


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"^CommitteeEstimator: members is empty; name at least one estimator$"
    ):
        CommitteeEstimator([])
    with pytest.raises(ValueError, match=r"CommitteeEstimator: memory must be in \[0, 1\), got 1.0"):
        CommitteeEstimator(memory=1.0)
    with pytest.raises(
        ValueError, match="CommitteeEstimator: interval must be an integer of at least 1, got 0"
    ):
        CommitteeEstimator(interval=0)
