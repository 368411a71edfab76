"""A saved history is taken over whole, or refused by name with nothing changed."""

import copy
import math
import re

import pytest
import torch

from optex import GradientHistory
from optex.estimators.saved import check_saved
from optex.vector_space import VectorSpace
from tests.models import assert_equal_trees


def saved(pairs=3, *, noise=None):
    """The state of a history of four slots in three dimensions, some of them filled."""
    generator = torch.Generator().manual_seed(0)
    history = GradientHistory(4, 3)
    points, gradients = (torch.randn(pairs, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    history.append(points, gradients, noise)
    return history.state_dict()


@pytest.mark.parametrize("pairs", [0, 1, 3, 4])
def test_what_was_saved_is_what_is_found(pairs):
    state = saved(pairs, noise=[0.0, 0.5, math.nan, 0.1][:pairs])
    found = check_saved(state, 4, VectorSpace(3))
    for name in ("displacements", "gradients", "iterate_gram", "gradient_gram", "cross_gram"):
        assert torch.equal(getattr(found, name), state[name])
    assert found.groups == state["groups"]
    assert [None if math.isnan(v) else v for v in found.noise] == state["noise"]
    assert found.appended == pairs
    assert (found.anchor is not None) == bool(pairs)
    if found.anchor is not None:
        assert torch.equal(found.anchor, state["anchor"])


def test_lists_are_not_shared_with_the_saved_state():
    state = saved()
    found = check_saved(state, 4, VectorSpace(3))
    assert found.groups is not state["groups"]
    assert found.noise is not state["noise"]


def test_no_noise_variances_are_numbers_again():
    state = saved(3, noise=[0.5, math.nan, 0.0])
    history = GradientHistory(4, 3)
    history.load_state_dict(state)
    assert history.is_sampled
    assert history.tells_noise
    assert history.state_dict()["noise"] == [0.5, None, 0.0, 0.0]


BROKEN = [
    (
        "displacements",
        torch.zeros(4, 2),
        "saved displacements are (4, 2) [T0, d], this history's (4, 3); "
        "build it with the same history_size and parameters",
    ),
    (
        "gradients",
        torch.zeros(5, 3),
        "saved gradients are (5, 3) [T0, d], this history's (4, 3); "
        "build it with the same history_size and parameters",
    ),
    ("displacements", torch.full((4, 3), math.nan), "saved displacements holds numbers that are not finite"),
    ("gradients", torch.full((4, 3), math.inf), "saved gradients holds numbers that are not finite"),
    ("gradients", "none", "saved gradients must be a floating-point tensor (4, 3), got 'none'"),
    (
        "displacements",
        torch.zeros(4, 3, dtype=torch.int64),
        "saved displacements must be a floating-point tensor (4, 3), got torch.int64 (4, 3)",
    ),
    (
        "iterate_gram",
        torch.zeros(3, 3),
        "saved iterate_gram must be a floating-point tensor (4, 4), got torch.float32 (3, 3)",
    ),
    (
        "gradient_gram",
        torch.zeros(4, 3),
        "saved gradient_gram must be a floating-point tensor (4, 4), got torch.float32 (4, 3)",
    ),
    ("cross_gram", torch.full((4, 4), math.nan), "saved cross_gram holds numbers that are not finite"),
    ("appended", -1, "saved appended must be an integer of at least 0, got -1"),
    ("appended", 0, "saved anchor and appended (0) contradict each other"),
    ("anchor", None, "saved anchor and appended (3) contradict each other"),
    ("anchor", torch.zeros(2), "saved anchor must be a floating-point tensor (3,), got torch.float32 (2,)"),
    ("anchor", torch.tensor([0.0, math.inf, 0.0]), "saved anchor holds numbers that are not finite"),
    ("groups", [0, 1, 2], "saved groups must be a list of 4, got [0, 1, 2]"),
    ("groups", "0123", "saved groups must be a list of 4, got '0123'"),
    ("groups", [0, 1, None, None], "saved groups do not fit 3 pairs, got None for slot 2"),
    ("groups", [0, 1, 2, 3], "saved groups do not fit 3 pairs, got 3 for slot 3"),
    ("groups", [0, True, 2, None], "saved groups do not fit 3 pairs, got True for slot 1"),
    ("groups", [0, 1, 2, "x"], "saved groups do not fit 3 pairs, got 'x' for slot 3"),
    ("noise", [0.0] * 5, "saved noise must be a list of 4, got [0.0, 0.0, 0.0, 0.0, 0.0]"),
    (
        "noise",
        [0.123456789] * 6,
        "saved noise must be a list of 4, got [0.123456789, 0.123456789, 0.123456789, 0.123456789, 0.12345",
    ),
    ("noise", [0.0, -1.0, 0.0, 0.0], "saved noise must be numbers that are not negative, or None, got -1.0"),
    (
        "noise",
        [0.0, "much", 0.0, 0.0],
        "saved noise must be numbers that are not negative, or None, got 'much'",
    ),
]


@pytest.mark.parametrize(("entry", "value", "message"), BROKEN)
def test_a_broken_entry_is_refused_by_name(entry, value, message):
    state = saved()
    state[entry] = value
    history = GradientHistory(4, 3)
    history.append(torch.ones(1, 3), torch.ones(1, 3))
    before = copy.deepcopy(history.state_dict())
    with pytest.raises(ValueError, match=f"^{re.escape(f'GradientHistory.load_state_dict: {message}')}$"):
        history.load_state_dict(state)
    assert_equal_trees(history.state_dict(), before)


@pytest.mark.parametrize("entry", sorted(saved()))
def test_an_entry_that_is_missing_is_named(entry):
    state = saved()
    del state[entry]
    with pytest.raises(
        ValueError, match=f"^GradientHistory.load_state_dict: the saved state has no entry '{entry}'"
    ):
        check_saved(state, 4, VectorSpace(3))


def test_noise_of_zero_and_tuples_are_taken():
    state = saved()
    state["noise"], state["groups"] = (0, 1, 0.5, 0.0), tuple(state["groups"])
    found = check_saved(state, 4, VectorSpace(3))
    assert found.noise == [0.0, 1.0, 0.5, 0.0]
    assert found.groups == [0, 1, 2, None]
