import contextlib
import copy
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optex import GradientHistory, small
from optex.estimators.arrivals import Arrivals
from tests.models import assert_equal_trees


def rows(count, dimension, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64).to(dtype)


def stored(history):
    """Iterates and gradients by age, the oldest first, and their slots."""
    order = [(history.appended + i) % history.size for i in range(history.size)]
    order = [slot for slot in order if history.filled[slot]]
    return (history.anchor + history.displacements)[order], history.gradients[order], order


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_keeps_the_last_pairs_and_their_gram_matrices(size, dimension, chunks, seed):
    history, points, gradients = GradientHistory(size, dimension), [], []
    for i, count in enumerate(chunks):
        points.append(rows(count, dimension, seed + 2 * i))
        gradients.append(rows(count, dimension, seed + 2 * i + 1))
        history.append(points[-1], gradients[-1])
    expected = torch.cat(points)[-size:], torch.cat(gradients)[-size:]
    iterates, values, order = stored(history)
    torch.testing.assert_close(iterates, expected[0], rtol=0, atol=1e-13)
    assert torch.equal(values, expected[1])
    torch.testing.assert_close(history.gradient_gram[order][:, order], values @ values.T)
    gaps = torch.cdist(expected[0], expected[0], compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(torch.as_tensor(history.squared_distances)[order][:, order], gaps)
    query = rows(2, dimension, seed + 77)
    gaps = torch.cdist(query, expected[0], compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(torch.as_tensor(history.locate(query).squared_distances)[:, order], gaps)


def test_float32_distances_survive_where_naive_norms_do_not():
    # A run of float32 iterates, each 1e-6 (relative) from the one before.
    start = 1 + rows(1, 100_000, dtype=torch.float32)[0].abs()
    history = GradientHistory(8, 100_000, dtype=torch.float32)
    points = [start]
    for i in range(20):
        points.append(points[-1] * (1 + 1e-6 * rows(1, 100_000, i + 1, torch.float32)[0]))
        history.append(points[-1][None], torch.zeros(1, 100_000))
    last = torch.stack(points[-8:])
    exact = torch.cdist(last.double(), last.double(), compute_mode="donot_use_mm_for_euclid_dist")
    _, _, order = stored(history)
    off_diagonal = ~torch.eye(8, dtype=torch.bool)

    ours = torch.as_tensor(history.squared_distances).sqrt()[order][:, order]
    assert (ours / exact - 1)[off_diagonal].abs().max() < 1e-3
    query = points[-1] * (1 + 1e-6 * rows(1, 100_000, 99, torch.float32)[0])
    to_query = (last.double() - query.double()).norm(dim=1)
    assert (
        torch.as_tensor(history.locate(query[None]).squared_distances)[0, order].sqrt() / to_query - 1
    ).abs().max() < 1e-3

    norms = (last**2).sum(1)
    naive = (norms[:, None] + norms - 2 * last @ last.T).clamp_min(0).sqrt()
    assert (naive / exact - 1)[off_diagonal].abs().max() > 0.1


def test_pairs_at_one_iterate_are_merged():
    history, points = GradientHistory(6, 3), rows(2, 3)
    history.append(points, torch.tensor([[1.0, 0, 0], [5.0, 5, 5]], dtype=torch.float64))
    history.append(points[:1], torch.tensor([[4.0, 0, 0]], dtype=torch.float64))
    history.append(points[:1], torch.tensor([[7.0, 3, 0]], dtype=torch.float64))
    assert history.counts.tolist() == [0, 1, 0, 3, 0, 0]
    merged = history.averaging @ history.gradients
    assert merged[3].tolist() == pytest.approx([4.0, 1.0, 0.0])
    assert merged[1].tolist() == [5, 5, 5]
    assert not merged[~history.active].any()
    assert torch.as_tensor(history.squared_distances)[0, 3] == 0


def test_merged_pairs_are_forgotten_one_by_one():
    history, points = GradientHistory(3, 2), rows(4, 2)
    history.append(points[[0, 0, 0]], torch.tensor([[1.0, 0], [2.0, 0], [6.0, 0]], dtype=torch.float64))
    assert history.counts.tolist() == [0, 0, 3]
    history.append(points[1:2], points[1:2])
    assert history.counts.tolist() == [1, 0, 2]
    assert (history.averaging @ history.gradients)[2, 0] == 4
    history.append(points[2:3], points[2:3])
    history.append(points[3:4], points[3:4])
    assert history.counts.tolist() == [1, 1, 1]


def test_merging_is_only_for_equal_iterates():
    history = GradientHistory(4, 2)
    history.append(
        torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-12]], dtype=torch.float64), torch.ones(2, 2).double()
    )
    assert history.counts.tolist() == [1, 1, 0, 0]


def test_dtype_is_apart_from_the_parameters():
    points, history = rows(4, 50), GradientHistory(4, 50, dtype=torch.bfloat16)
    history.append(points, points)
    assert history.displacements.dtype == history.gradients.dtype == torch.bfloat16
    assert history.reference.dtype == torch.float64
    assert history.iterate_gram.dtype == torch.float64
    exact = torch.cdist(points, points)
    torch.testing.assert_close(torch.as_tensor(history.squared_distances).sqrt(), exact, rtol=0.02, atol=0.02)


def test_state_goes_round():
    history = GradientHistory(5, 3)
    for i in range(4):
        history.append(rows(2, 3, i), rows(2, 3, i + 50))
    twin = GradientHistory(5, 3)
    twin.load_state_dict(history.state_dict())
    for each in (history, twin):
        each.append(rows(3, 3, 9), rows(3, 3, 10))
    for name, value in history.state_dict().items():
        assert (
            torch.equal(value, twin.state_dict()[name])
            if torch.is_tensor(value)
            else value == twin.state_dict()[name]
        )


@pytest.mark.parametrize("used", [False, True])
def test_clear_forgets_everything(used):
    history = GradientHistory(3, 2)
    history.append(rows(4, 2)[[0, 1, 0]], rows(3, 2), [0.5, math.nan, 0.1])
    if used:
        use(history)
    history.clear()
    assert_equal_trees(everything(history), everything(GradientHistory(3, 2)))
    assert len(history) == 0
    assert history.representatives == []
    assert not history.active.any()
    assert math.isnan(history.median_squared_distance)
    twin = GradientHistory(3, 2)
    for each in (history, twin):
        each.append(rows(2, 2, 5), rows(2, 2, 6))
        use(each)
    assert_equal_trees(everything(history), everything(twin))


def test_a_history_of_the_same_kind_is_empty():
    history = GradientHistory(3, 2, dtype=torch.bfloat16)
    history.append(rows(2, 2), rows(2, 2))
    like = history.like()
    assert like.space is history.space
    assert like.gradients.dtype == like.displacements.dtype == torch.bfloat16
    assert_equal_trees(everything(like), everything(GradientHistory(3, 2, dtype=torch.bfloat16)))


def test_a_history_is_of_float64_in_main_memory_unless_told_otherwise():
    history = GradientHistory(3, 2)
    assert history.displacements.dtype == history.gradients.dtype == torch.float64
    assert history.displacements.device == torch.device("cpu")


@pytest.mark.parametrize("far", [False, True])
def test_the_anchor_is_a_copy(far):
    # The first pair's iterate, and the one that it moves to.
    history, points = GradientHistory(6, 3), rows(3, 3)
    if far:
        history.append(rows(4, 3, 1), rows(4, 3, 1))
        points = 1e6 + points[:1]
    history.append(points, points)
    expected = points[-1].clone()
    points.zero_()
    assert torch.equal(history.reference, expected)


def test_gradients_are_exact_unless_told_otherwise():
    history = GradientHistory(3, 2)
    assert history.dimension == 2
    assert history.state_dict()["noise"] == [0.0] * 3
    history.append(rows(2, 2), rows(2, 2))
    assert not history.is_sampled
    assert not history.tells_noise
    assert history.noise_variance.tolist() == [0.0] * 3


def test_a_loaded_history_shares_nothing_with_the_saved_one():
    history, twin = GradientHistory(5, 3), GradientHistory(5, 3)
    history.append(rows(3, 3), rows(3, 3, 1), [0.5, math.nan, 0.0])
    twin.append(rows(5, 3, 7), rows(5, 3, 8))
    use(twin)
    state = history.state_dict()
    saved = copy.deepcopy(state)
    twin.load_state_dict(state)
    use(history)
    assert_equal_trees(everything(twin), everything(history))
    for each in (history, twin):
        each.append(1e6 + rows(3, 3, 9), rows(3, 3, 10))
        use(each)
    assert_equal_trees(state, saved)
    assert_equal_trees(everything(twin), everything(history))
    twin.load_state_dict(state)
    state["anchor"].zero_()
    assert torch.equal(twin.reference, saved["anchor"])


@pytest.mark.parametrize("as_on_accelerators", [False, True])
@pytest.mark.parametrize(
    ("places", "median"),
    [([0.0], 1.0), ([0.0, 0.0], 1.0), ([0.0, 1.0, 3.0], 2.0), ([0.0, 1.0, 3.0, 7.0], 3.0)],
)
def test_the_median_is_that_of_distances_between_iterates(places, median, as_on_accelerators):
    # Of an even number the lower one of the two in the middle.
    with small.tensors() if as_on_accelerators else contextlib.nullcontext():
        history = GradientHistory(6, 1)
        points = torch.tensor(places, dtype=torch.float64)[:, None]
        history.append(points, points)
        assert float(history.median_distance) == median


def test_what_is_derived_is_found_once_until_the_next_pair():
    history, calls = GradientHistory(3, 2), []
    history.append(rows(1, 2), rows(1, 2))
    for _ in range(2):
        assert history.derived("mine", lambda: calls.append(1) or "found") == "found"
    assert calls == [1]
    history.append(rows(1, 2, 1), rows(1, 2, 1))
    assert history.derived("mine", lambda: "anew") == "anew"


@pytest.mark.parametrize("known", [(), ("on_displacements",), ("on_displacements", "on_gradients")])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pairs_whose_products_are_known_are_remembered_alike(count, known):
    history, twin = GradientHistory(3, 4), GradientHistory(3, 4)
    for each in (history, twin):
        each.append(rows(3, 4), rows(3, 4, 1))
    use(history)
    arrivals = Arrivals(history, rows(count, 4, 2), rows(count, 4, 3))
    for name in known:
        _ = getattr(arrivals, name), getattr(arrivals.locations, name)
    history.append(arrivals.points, arrivals.gradients, arrivals=arrivals)
    twin.append(arrivals.points, arrivals.gradients)
    for name in ("iterate_gram", "gradient_gram", "cross_gram", "displacements", "gradients", "averaging"):
        torch.testing.assert_close(getattr(history, name), getattr(twin, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_products_that_are_known_are_not_taken_again(count, monkeypatch):
    history = GradientHistory(3, 4)
    history.append(rows(3, 4), rows(3, 4, 1))
    use(history)
    arrivals = Arrivals(history, rows(count, 4, 2), rows(count, 4, 3))
    for part, names in (
        (arrivals.locations, ["on_gradients"]),
        (arrivals, ["on_displacements", "on_gradients"]),
    ):
        for name in names:
            _ = getattr(part, name)
    _ = arrivals.offsets_among, arrivals.mixed_among, arrivals.gradients_among
    calls, real = [], history.space.inner_products
    monkeypatch.setattr(history.space, "inner_products", lambda *a: calls.append(1) or real(*a))
    history.append(arrivals.points, arrivals.gradients, arrivals=arrivals)
    use(history)
    assert calls == []


def test_the_anchor_keeps_its_precision_wherever_it_goes():
    history = GradientHistory(6, 2, dtype=torch.float32)
    history.append(rows(4, 2).float(), rows(4, 2))
    history.append(1e6 + rows(1, 2), rows(1, 2))
    assert history.reference.dtype == torch.float32
    assert history.reference.min() > 1e5


def test_an_empty_history_is_taken_over_by_a_filled_one():
    history, empty = GradientHistory(3, 2), GradientHistory(3, 2)
    history.append(rows(2, 2), rows(2, 2))
    use(history)
    history.load_state_dict(empty.state_dict())
    assert history.anchor is None
    assert_equal_trees(everything(history), everything(empty))
    assert math.isnan(history.median_squared_distance)


def test_rows_that_are_put_aside_use_the_same_memory_every_time():
    history = GradientHistory(4, 3)
    history.append(rows(4, 3), rows(4, 3, 1))
    first, second = history.before_append(2), history.before_append(2)
    assert [a.data_ptr() for a in first.rows] == [b.data_ptr() for b in second.rows]
    assert first.slots == [0, 1]
    assert torch.equal(second.rows[0], history.displacements[:2])
    assert torch.equal(second.rows[1], history.gradients[:2])
    assert history.before_append(9).slots == [0, 1, 2, 3]


def exactly(message):
    return f"^{re.escape(message)}$"


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="GradientHistory: size must be an integer of at least 1, got 0"):
        GradientHistory(0, 3)
    for points, gradients in (((2, 4), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,)), ((1, 1, 3), (1, 1, 3))):
        message = f"GradientHistory.append: points {points} and gradients {gradients} must both be [n, 3]"
        with pytest.raises(ValueError, match=exactly(message)):
            GradientHistory(2, 3).append(torch.zeros(points), torch.zeros(gradients))
    with pytest.raises(ValueError, match="build it with the same history_size and"):
        GradientHistory(2, 3).load_state_dict(GradientHistory(3, 3).state_dict())
    for noise in ([-1.0], [0.0, 0.0]):
        message = (
            "GradientHistory.append: noise_variance must be 1 numbers that are not negative (NaN where it is "
            f"not known), got {noise}"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            GradientHistory(2, 3).append(torch.zeros(1, 3), torch.zeros(1, 3), noise)
    message = "GradientHistory: the history is empty; append a pair first"
    with pytest.raises(RuntimeError, match=exactly(message)):
        GradientHistory(2, 3).displacement(torch.zeros(1, 3))


# Kinds of iterates: anywhere near the origin, beside the one before, that one again or the first one again, and
# so far away that the anchor moves.
KINDS = st.lists(st.sampled_from(["any", "near", "last", "first", "far"]), min_size=1, max_size=8)


class Walk:
    """Makes up pairs of the kinds that are asked for."""

    def __init__(self, dimension, seed):
        self._generator = torch.Generator().manual_seed(seed)
        self._points = [self._random(dimension)]

    def _random(self, dimension):
        return torch.randn(dimension, generator=self._generator, dtype=torch.float64)

    def pairs(self, kinds):
        """Iterates [n, d], gradients [n, d] and n noise variances."""
        start = len(self._points)
        for kind in kinds:
            last = self._points[-1]
            random = self._random(len(last))
            self._points.append(
                {
                    "any": random,
                    "near": last + 1e-3 * random,
                    "last": last.clone(),
                    "first": self._points[0].clone(),
                    "far": last + 1e4 * random,
                }[kind]
            )
        points = torch.stack(self._points[start:])
        noise = [(0.0, 0.5, math.nan)[i % 3] for i in range(start, len(self._points))]
        return points, torch.stack([self._random(points.shape[1]) for _ in points]), noise


def everything(history):
    """All that a history holds, copied."""
    apart = ("space", "_spare", "_derived")
    held = {name: copy.deepcopy(value) for name, value in vars(history).items() if name not in apart}
    held["_noise"] = ["unknown" if math.isnan(variance) else variance for variance in held["_noise"]]
    return held


def use(history):
    """Bring up to date what is computed on demand."""
    _ = history.gradient_gram, history.cross_gram, torch.as_tensor(history.squared_distances)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(1, 7),
    st.integers(1, 4),
    st.lists(KINDS, max_size=4),
    KINDS,
    st.booleans(),
    st.integers(0, 10_000),
)
@example(torch.float64, 4, 3, [], ["any", "last", "far"], True, 0)  # of the first round
@example(torch.float64, 6, 3, [["any", "near", "any", "near"]], ["far"], True, 0)  # the anchor moves
@example(torch.float32, 6, 3, [["any", "near", "last"]], ["last", "first", "last"], True, 1)  # pairs are merged
@example(torch.float64, 5, 2, [["any", "last", "near", "last"]], ["last", "far", "far", "last"], True, 2)
@example(torch.float64, 5, 2, [["any", "last", "near", "last"]], ["last", "far", "far", "last"], False, 2)
@example(torch.bfloat16, 3, 2, [["any"] * 5], ["near"] * 8, True, 3)  # more than it holds
def test_an_append_is_taken_back_to_the_bit(dtype, size, dimension, earlier, kinds, used, seed):
    history, walk = GradientHistory(size, dimension, dtype=dtype), Walk(dimension, seed)
    for chunk in earlier:
        history.append(*walk.pairs(chunk))
    if used:
        use(history)
    expected, twin = everything(history), copy.deepcopy(history)
    before = history.before_append(len(kinds))
    history.append(*walk.pairs(kinds))
    use(history)
    for _ in range(2):  # one that was interrupted is called again
        history.take_back(before)
        assert_equal_trees(everything(history), expected)
    then = walk.pairs(["near", "first", "far"])
    for each in (history, twin):
        each.append(*then)
        use(each)
    assert_equal_trees(everything(history), everything(twin))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.lists(KINDS, min_size=1, max_size=5), st.lists(st.booleans()), st.integers(0, 10_000)
)
@example(8, [["any", "near", "any"], ["far"]], [True], 0)
def test_gram_matrices_are_those_of_the_rows_wherever_the_anchor_goes(size, chunks, used, seed):
    history, walk = GradientHistory(size, 3), Walk(3, seed)
    for i, chunk in enumerate(chunks):
        history.append(*walk.pairs(chunk))
        if used[i : i + 1] == [True]:
            use(history)
    displacements, gradients = history.displacements, history.gradients
    assert not displacements[~history.filled].any()
    for ours, left, right in (
        (history.iterate_gram, displacements, displacements),
        (history.gradient_gram, gradients, gradients),
        (history.cross_gram, gradients, displacements),
    ):
        torch.testing.assert_close(ours, left @ right.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("last", "anchor"), [(15.9, 0.0), (16.5, 16.5)])
def test_the_anchor_moves_beyond_eight_median_distances(last, anchor):
    # From 0, 1 and 2 and such a point, the lower median distance is 2.
    history = GradientHistory(6, 1)
    for point in (0.0, 1.0, 2.0, last):
        history.append(torch.tensor([[point]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert history.reference.item() == anchor
    expected = torch.tensor([0.0, 1.0, 2.0, last, anchor, anchor], dtype=torch.float64) - anchor
    torch.testing.assert_close(history.displacements[:, 0], expected)


def test_distances_survive_a_run_that_goes_far():
    # The norms are 1e12 times the squared distances, and float32 has 1e7 to tell them apart.
    start = rows(1, 1000, dtype=torch.float32)
    far = torch.cat([1e4 + 1e-2 * rows(1, 1000, i + 1) for i in range(5)]).float()
    history = GradientHistory(4, 1000, dtype=torch.float32)
    for point in torch.cat([start, far]):
        history.append(point[None], torch.zeros(1, 1000))
    last = far[-4:].double()
    exact = torch.cdist(last, last, compute_mode="donot_use_mm_for_euclid_dist")
    *_, order = stored(history)
    ours = torch.as_tensor(history.squared_distances).sqrt()[order][:, order]
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0)
    to_query = (last - far[0].double()).norm(dim=1)
    located = torch.as_tensor(history.locate(far[:1]).squared_distances)[0, order].sqrt()
    torch.testing.assert_close(located, to_query, rtol=1e-3, atol=0)


def test_rows_are_rounded_once_while_a_run_stays_near():
    # An anchor that moved at every append would round the rows every time.
    history, points = GradientHistory(40, 50, dtype=torch.bfloat16), rows(40, 50)
    for point in points:
        history.append(point[None], point[None])
    assert torch.equal(history.reference, points[0])
    assert torch.equal(history.displacements, (points - points[0]).bfloat16())


@pytest.mark.parametrize("stored_in", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_in", [torch.float64, torch.float32])
def test_displacements_are_subtracted_in_the_wider_precision(stored_in, given_in):
    # Steps of which the narrower precision sees nothing, or but a digit, at the points themselves.
    step = {torch.float64: 1e-10, torch.float32: 1e-5}[given_in]
    points = (3 + step * rows(6, 20)).to(given_in)
    history = GradientHistory(6, 20, dtype=stored_in)
    history.append(points, points)
    exact = points.double() - points[-1].double()
    assert history.displacement(points).dtype == torch.promote_types(stored_in, given_in)
    assert torch.equal(history.displacement(points).double(), exact)
    assert torch.equal(history.displacements, exact.to(stored_in))
    distances = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    rounding = 4 * torch.finfo(stored_in).eps if stored_in is torch.bfloat16 else 1e-5
    gaps = torch.as_tensor(history.squared_distances).sqrt() - distances
    assert gaps.abs().max() < rounding * distances.max()


@pytest.mark.parametrize("stored_in", [torch.float64, torch.float32])
def test_points_in_less_than_the_anchor_are_subtracted_in_its_precision(stored_in):
    # As after loading a run of float64 into one of float32, or the other way round.
    history = GradientHistory(2, 3, dtype=stored_in)
    history.append(torch.full((1, 3), 1.0, dtype=torch.float32), torch.zeros(1, 3))
    points = torch.full((1, 3), 1 + 2.0**-30, dtype=torch.float64)
    assert history.displacement(points).tolist() == [[2.0**-30] * 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_iterate_is_at_no_distance_from_itself(dtype):
    # The first two rows differ in their last digit, and count as one iterate; the third is another.
    history, eps = GradientHistory(5, 3, dtype=dtype), torch.finfo(dtype).eps
    points = torch.tensor([[1.0, 1, 1], [1 + eps, 1, 1], [2.0, 2, 2], [0.0, 0, 0]], dtype=torch.float64)
    history.append(points, points)
    assert history.counts.tolist() == [0, 2, 1, 1, 0]
    squared = torch.as_tensor(history.squared_distances)
    assert not torch.equal(history.displacements[0], history.displacements[1])
    assert squared[0, 1] == squared[1, 0] == 0
    assert not squared.diagonal().any()
    assert (squared[:2, 2:4] > 1).all()
    assert history.median_squared_distance >= 3  # rounding is no distance between iterates


def assert_newest_stand_for_their_iterates(size, chunks):
    """Append pairs at these places, whole numbers, whose differences are exact wherever the anchor is."""
    history, places = GradientHistory(size, 1), [place for chunk in chunks for place in chunk]
    gradients, noise = rows(len(places), 1), [0.5 + i for i in range(len(places))]
    done = 0
    for chunk in chunks:
        end = done + len(chunk)
        history.append(torch.tensor(chunk).double()[:, None], gradients[done:end], noise[done:end])
        done = end
    groups = {}
    for number in range(max(0, done - size), done):
        groups.setdefault(places[number], []).append(number)
    assert history.representatives == sorted(numbers[-1] % size for numbers in groups.values())
    assert history.counts.sum() == len(history)
    for numbers in groups.values():
        slot = numbers[-1] % size
        assert history.counts[slot] == len(numbers)
        merged = history.averaging[slot] @ history.gradients
        torch.testing.assert_close(merged, gradients[numbers].mean(0))
        variance = sum(noise[number] for number in numbers) / len(numbers) ** 2
        assert history.noise_variance[slot].item() == pytest.approx(variance)
        for number in numbers[:-1]:
            assert history.counts[number % size] == 0
            assert not history.averaging[number % size].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_the_newest_pair_stands_for_all_at_its_iterate(size, places):
    assert_newest_stand_for_their_iterates(size, [[place] for place in places])


def test_pairs_that_come_together_all_join_the_old_ones_of_their_iterate():
    # The ring has gone round: of the two new pairs, the second has the lower slot.
    assert_newest_stand_for_their_iterates(3, [[0, 0], [0, 0]])


def test_products_of_all_rows_are_gradients_first():
    history = GradientHistory(4, 5)
    history.append(rows(3, 5, 1), rows(3, 5, 2))
    both = torch.cat([history.gradients, history.displacements])
    torch.testing.assert_close(torch.as_tensor(history.row_gram), both @ both.T, rtol=1e-12, atol=1e-12)
