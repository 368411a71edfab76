import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optex import GradientHistory


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
    torch.testing.assert_close(history.pairwise_squared_distances()[order][:, order], gaps)
    query = rows(2, dimension, seed + 77)
    gaps = torch.cdist(query, expected[0], compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(history.locate(query).squared_distances[:, order], gaps)


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

    ours = history.pairwise_squared_distances().sqrt()[order][:, order]
    assert (ours / exact - 1)[off_diagonal].abs().max() < 1e-3
    query = points[-1] * (1 + 1e-6 * rows(1, 100_000, 99, torch.float32)[0])
    to_query = (last.double() - query.double()).norm(dim=1)
    assert (history.locate(query[None]).squared_distances[0, order].sqrt() / to_query - 1).abs().max() < 1e-3

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
    assert history.pairwise_squared_distances()[0, 3] == 0


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
    assert history.anchor.dtype == torch.float64
    assert history.iterate_gram.dtype == torch.float64
    exact = torch.cdist(points, points)
    torch.testing.assert_close(history.pairwise_squared_distances().sqrt(), exact, rtol=0.02, atol=0.02)


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


def test_clear_forgets_everything():
    history = GradientHistory(3, 2)
    history.append(rows(2, 2), rows(2, 2))
    history.clear()
    assert len(history) == 0
    assert not history.active.any()
    assert history.gradient_gram.abs().sum() == 0


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="GradientHistory: size must be an integer of at least 1, got 0"):
        GradientHistory(0, 3)
    with pytest.raises(ValueError, match=r"points \(2, 4\) and gradients \(2, 4\) must both be \[n, 3\]"):
        GradientHistory(2, 3).append(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="build it with the same history_size and"):
        GradientHistory(2, 3).load_state_dict(GradientHistory(3, 3).state_dict())
    for noise in ([-1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="noise_variance must be 1 numbers that are not negative"):
            GradientHistory(2, 3).append(torch.zeros(1, 3), torch.zeros(1, 3), noise)
    with pytest.raises(RuntimeError, match="the history is empty"):
        GradientHistory(2, 3).displacement(torch.zeros(1, 3))
