"""The stride's rule and what it rests on, number by number."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from optex.round.stride import LARGEST, Stride, read_stride
from optex.round.surprise import FEWEST, MEMORY, Surprises
from optex.vector_space import VectorSpace

NOTHING = Surprises()


def exactly(message):
    return f"^{re.escape(message)}$"


# ---------------------------------------------------------------------- the argument


@pytest.mark.parametrize(
    ("stride", "expected"), [("auto", LARGEST), (1, 1.0), (2.5, 2.5), (np.float32(4), 4.0), (np.int64(3), 3.0)]
)
def test_the_largest_stride_is_read(stride, expected):
    read = read_stride(stride)
    assert read == expected
    assert type(read) is float


@pytest.mark.parametrize("stride", [True, None, "bold", [2]])
def test_what_is_no_number_is_refused(stride):
    message = (
        "stride must be 'auto', or how many steps a round drafts at most for each gradient that it evaluates "
        f"(1: none on predictions alone), got {stride!r}"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        read_stride(stride)


@pytest.mark.parametrize("stride", [0.99, 0, -1, math.inf, math.nan])
def test_numbers_out_of_range_are_refused(stride):
    with pytest.raises(
        ValueError, match=exactly(f"stride must be 'auto' or a finite number of at least 1, got {stride}")
    ):
        read_stride(stride)


# ---------------------------------------------------------------------- drafted steps


@pytest.mark.parametrize(
    ("value", "count", "positions"),
    [
        (1.0, 1, [0]),
        (9.0, 1, [0]),
        (1.0, 4, [0, 1, 2, 3]),
        (3.0, 4, [0, 4, 7, 11]),
        (2.5, 3, [0, 3, 6]),
        (0.5, 3, [0, 1, 2]),  # never fewer than are evaluated
        (16.0, 2, [0, 31]),
    ],
)
def test_evaluated_steps_stand_at_the_ends_and_evenly_between(value, count, positions):
    assert Stride(value=value).positions(count) == positions
    assert Stride(value=value).steps(count) == max(count, int(count * value))


# ---------------------------------------------------------------------- deterministic gradients


def deterministic(value, count, kept, error=math.nan, *, most=16.0):
    return Stride(most=most, value=value).after(count, kept, Surprises(error, 0.0), deterministic=True).value


@pytest.mark.parametrize(
    ("value", "count", "kept", "error", "expected"),
    [
        (2.0, 4, 8, math.nan, 6.0),  # kept whole: three times as long
        (2.5, 4, 9, math.nan, 7.5),  # nine of ten are as good as all
        (2.5, 4, 8, math.nan, 2.0),  # what was kept
        (2.0, 4, 2, math.nan, 1.0),  # but never less than 1
        (6.0, 4, 24, math.nan, 16.0),  # nor more than the largest
        (2.0, 4, 8, 0.49, 6.0),
        (2.0, 4, 8, 0.5, 2.0),  # too wrong to grow
        (2.0, 4, 6, 0.5, 1.5),
        (2.0, 4, 8, 0.99, 2.0),
        (2.0, 4, 8, 1.0, 1.0),  # worthless
        (2.0, 4, 8, math.inf, 1.0),
        (2.0, 1, 2, math.nan, 6.0),
    ],
)
def test_deterministic_strides(value, count, kept, error, expected):
    assert deterministic(value, count, kept, error) == expected


def test_the_largest_bounds_the_stride():
    assert deterministic(2.0, 4, 8, most=5.0) == 5.0
    assert deterministic(2.0, 4, 8, most=1.0) == 1.0


# ---------------------------------------------------------------------- sampled gradients


@pytest.mark.parametrize(
    ("value", "kept", "squared_error", "noise", "expected"),
    [
        (4.0, 4, 0.25, 0.0, 5.0),  # harmless: a quarter more
        (4.0, 4, 0.26, 0.0, 4.0),
        (4.0, 4, 0.32, 0.0, 4.0),  # 1.3 times that is put up with
        (4.0, 4, 0.33, 0.0, 4.0 / 1.5),
        (4.0, 4, 0.35, 0.4, 5.0),  # four gradients of that noise would be off by as much
        (4.0, 4, 0.36, 0.4, 4.0),
        (4.0, 4, 0.64, 100.0, 5.0),  # however noisy they are, there is a limit
        (4.0, 4, 0.66, 100.0, 4.0),
        (4.0, 4, 0.84, 100.0, 4.0),
        (4.0, 4, 0.85, 100.0, 4.0 / 1.5),
        (4.0, 4, math.nan, math.nan, 4.0),
        (4.0, 3, 0.1, 0.0, 3.0),  # what was kept
        (4.0, 1, 0.1, 0.0, 1.0),
        (14.0, 14, 0.1, 0.0, 16.0),
        (1.2, 1, 0.5, 0.0, 1.0),
    ],
)
def test_sampled_strides(value, kept, squared_error, noise, expected):
    surprises = Surprises(math.sqrt(squared_error), noise)
    after = Stride(value=value).after(1, kept, surprises, deterministic=False)
    assert after.value == pytest.approx(expected, rel=1e-12)


def test_sampled_strides_of_several_gradients_fall_to_what_was_kept_for_each():
    after = Stride(value=4.0).after(2, 6, Surprises(0.1, 0.0), deterministic=False)
    assert after.value == 3.0


# ---------------------------------------------------------------------- rests


def rounds_until_rest(stride, *, sampled=True):
    """Rounds of one step without a gain, until the next rest begins."""
    wrong = Surprises(1.0, 0.0)
    for number in range(1, 100):
        stride = stride.after(1, 1, wrong, deterministic=not sampled)
        if stride.rest:
            return number, stride
        assert stride.watched == number
    raise AssertionError("no rest")


@pytest.mark.parametrize("sampled", [True, False])
def test_rests_begin_after_32_rounds_and_then_after_16(sampled):
    stride, found = Stride(), []
    for _ in range(5):
        number, stride = rounds_until_rest(stride, sampled=sampled)
        found.append((number, stride.rest, stride.pause, stride.watched))
        while stride.rest:
            before = stride.rest
            stride = stride.rested()
            assert stride.rest == before - 1
    assert found == [(32, 16, 64, 0), (16, 64, 256, 0), (16, 256, 512, 0), (16, 512, 512, 0), (16, 512, 512, 0)]


def test_a_gain_makes_rests_short_again():
    watched = Stride(pause=256, watched=15)
    gained = watched.after(1, 1, Surprises(0.1, 0.0), deterministic=False)  # a stride above 1
    assert (gained.rest, gained.pause, gained.watched) == (0, 16, 0)
    assert gained.value == 1.25
    gained = watched.after(1, 2, Surprises(1.0, 0.0), deterministic=True)  # a second step kept
    assert (gained.rest, gained.pause, gained.watched) == (0, 16, 0)
    nothing = watched.after(1, 1, Surprises(1.0, 0.0), deterministic=True)
    assert (nothing.rest, nothing.pause) == (256, 512)


def test_rounds_of_several_gradients_never_rest():
    watched = Stride(pause=256, watched=15)
    after = watched.after(2, 1, Surprises(1.0, 0.0), deterministic=False)
    assert after == replace(watched, value=1.0)


# ---------------------------------------------------------------------- saved


def test_saved_strides_are_loaded_within_the_bound():
    saved = Stride(value=7.0, rest=3, pause=64, watched=5).state_dict()
    assert saved == {"value": 7.0, "rest": 3, "pause": 64, "watched": 5}
    assert Stride(most=9.0).loaded(saved) == Stride(9.0, 7.0, 3, 64, 5)
    assert Stride(most=4.0).loaded(saved) == Stride(4.0, 4.0, 3, 64, 5)
    assert Stride(most=4.0).loaded(saved | {"value": 1}).value == 1


@pytest.mark.parametrize(
    ("entry", "value", "wanted"),
    [
        ("value", 0.99, "must be a number of at least 1, got 0.99"),
        ("value", "x", "must be a number of at least 1, got 'x'"),
        ("rest", -1, "must be an integer of at least 0, got -1"),
        ("pause", 1.5, "must be an integer of at least 0, got 1.5"),
        ("watched", None, "must be an integer of at least 0, got None"),
    ],
)
def test_saved_strides_that_are_none_are_refused_by_name(entry, value, wanted):
    state = Stride().state_dict()
    with pytest.raises(ValueError, match=exactly(f"Stride.loaded: saved {entry} {wanted}")):
        Stride().loaded(state | {entry: value})
    del state[entry]
    with pytest.raises(
        ValueError,
        match=exactly(
            f"Stride.loaded: the saved state has no entry {entry!r}; it was cut short, or is another's"
        ),
    ):
        Stride().loaded(state)


# ---------------------------------------------------------------------- surprises


def test_deterministic_gradients_are_compared_directly():
    gaps, norms = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    before = Surprises(9.0, 9.0)
    found = before.compared(gaps, norms)
    assert (found.relative_error, found.relative_noise) == (0.5, 0.0)
    assert found.averages is before.averages
    assert before.compared(gaps, torch.zeros(2)).relative_error == math.inf


def rows(count, seed):
    return torch.randn(count, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def averaged_by_hand(rounds):
    """The four averages and what they say, from the definitions."""
    averages = np.zeros(4)
    for predicted, measured, places in rounds:
        pairs = [(mu, measured[place]) for mu, place in zip(predicted, places, strict=True)]
        new = [
            np.mean([float(mu @ mu) for mu, _ in pairs]),
            np.mean([float(mu @ g) for mu, g in pairs]),
            np.mean([float(a @ b) for a, b in pairwise(measured)]),
            np.mean([float(g @ g) for _, g in pairs]),
        ]
        averages = MEMORY * averages + (1 - MEMORY) * np.array(new)
    predicted, both, signal, measured = averages
    wrong = max(predicted - 2 * both + signal, 0)
    return averages, math.sqrt(wrong / signal), max(measured - signal, 0) / signal


def sampled_rounds(count):
    """Gradients around one direction, and predictions of some of them."""
    true = 2 * rows(1, 1000)
    return [
        (true + 0.5 * rows(2, 2 * i), true + rows(4, 2 * i + 1), [3, 1] if i % 2 else [0, 2])
        for i in range(count)
    ]


def test_sampled_gradients_say_nothing_before_the_third_round():
    surprises, rounds = Surprises(), sampled_rounds(4)
    for i, (predicted, measured, places) in enumerate(rounds, start=1):
        surprises = surprises.averaged(VectorSpace(50), predicted, measured, places)
        averages, error, noise = averaged_by_hand(rounds[:i])
        assert surprises.averages.rounds == i
        assert surprises.state_dict()["products"] == pytest.approx(list(averages), rel=1e-12)
        if i < FEWEST:
            assert math.isnan(surprises.relative_error)
            assert math.isnan(surprises.relative_noise)
        else:
            assert surprises.relative_error == pytest.approx(error, rel=1e-12)
            assert surprises.relative_noise == pytest.approx(noise, rel=1e-12)
        weight = 1 - MEMORY**i
        assert surprises.usual_length == pytest.approx(math.sqrt(averages[0] / weight), rel=1e-12)
        assert Surprises.loaded(surprises.state_dict()).averages == surprises.averages


def test_nothing_predicted_has_no_usual_length():
    assert Surprises().usual_length == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_vectors_that_are_not_finite_are_left_out(which, bad):
    surprises, round_ = Surprises(0.1, 0.2), sampled_rounds(1)[0]
    round_[which][0, 0] = bad
    assert surprises.averaged(VectorSpace(50), *round_) is surprises


def products(predicted, both, successive, measured, rounds=5):
    return {"products": [predicted, both, successive, measured], "rounds": rounds}


@pytest.mark.parametrize(
    ("state", "error", "noise"),
    [
        (products(4.0, 1.0, 1.0, 3.0), math.sqrt(3.0), 2.0),
        (products(1.0, 2.0, 1.0, 0.5), 0.0, 0.0),  # averages may contradict each other: never less than none
        (products(1.0, 1.0, 0.0, 1.0), math.inf, math.inf),  # nothing in common
        (products(1.0, 1.0, -1.0, 1.0), math.inf, math.inf),
        (products(4.0, 1.0, 1.0, 3.0, rounds=3), math.sqrt(3.0), 2.0),
        (products(4.0, 1.0, 1.0, 3.0, rounds=2), math.nan, math.nan),
    ],
)
def test_what_averages_say(state, error, noise):
    found = Surprises.loaded(state)
    assert found.state_dict() == state
    assert found.relative_error == pytest.approx(error, nan_ok=True)
    assert found.relative_noise == pytest.approx(noise, nan_ok=True)


@pytest.mark.parametrize(
    "value", [[1.0] * 3, [1.0, 1.0, 1.0, math.nan], [1.0, 1.0, 1.0, 1], "four", None, {1.0, 2.0, 3.0, 4.0}]
)
def test_saved_averages_that_are_none_are_refused_by_name(value):
    message = f"Surprises.loaded: saved products must be four finite numbers, got {value!r}"
    with pytest.raises(ValueError, match=exactly(message)):
        Surprises.loaded({"products": value, "rounds": 5})


def test_long_nonsense_is_cut_short_in_the_message():
    message = "Surprises.loaded: saved products must be four finite numbers, got '" + "x" * 76 + "..."
    with pytest.raises(ValueError, match=exactly(message)):
        Surprises.loaded({"products": "x" * 100, "rounds": 5})


def test_entries_that_are_missing_are_named():
    for name in ("products", "rounds"):
        state = products(1.0, 1.0, 1.0, 1.0)
        del state[name]
        with pytest.raises(ValueError, match=f"^Surprises.loaded: the saved state has no entry '{name}'"):
            Surprises.loaded(state)
    with pytest.raises(
        ValueError, match=exactly("Surprises.loaded: saved rounds must be an integer of at least 0, got -1")
    ):
        Surprises.loaded(products(1.0, 1.0, 1.0, 1.0, rounds=-1))
