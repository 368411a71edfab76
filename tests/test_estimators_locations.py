"""Points seen from a history: whatever is known of them already, it is what is found anew."""

import numpy as np
import pytest
import torch

from optex import GradientHistory
from optex.estimators.locations import Locations

KNOWN = ["on_displacements", "on_gradients"]


def rows(count, seed):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def history_of(dtype=torch.float64):
    history = GradientHistory(4, 5, dtype=dtype)
    history.append(rows(3, 0), rows(3, 1))
    return history


def assert_located(locations, history, points):
    """Everything that is asked of locations, written out."""
    offsets = points - history.reference
    assert len(locations) == len(points)
    assert torch.equal(locations.points, points)
    assert torch.equal(locations.offsets, offsets)
    near = (offsets @ history.displacements.mT, offsets @ history.gradients.mT, offsets.square().sum(1))
    distances = torch.cdist(offsets, history.displacements, compute_mode="donot_use_mm_for_euclid_dist")
    found = (locations.on_displacements, locations.on_gradients, locations.norms)
    for ours, expected in zip(found, near, strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(locations.squared_distances, distances.square().numpy(), rtol=1e-11, atol=1e-11)


@pytest.fixture
def counted(monkeypatch):
    """How often products with long rows were taken."""
    calls = []
    from optex.estimators import locations

    for name in ("inner_products", "squared_norms"):
        real = getattr(locations, name)
        monkeypatch.setattr(locations, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return calls


@pytest.mark.parametrize("first", ["offsets", "norms", *KNOWN, "squared_distances"])
def test_each_product_is_taken_once_whatever_is_asked_for_first(first, counted):
    history, points = history_of(), rows(2, 7)
    locations = history.locate(points)
    _ = getattr(locations, first)
    for _ in range(2):
        assert_located(locations, history, points)
    assert sorted(counted) == ["inner_products", "inner_products", "squared_norms"]


def test_gradients_products_cost_nothing_once_they_are_there():
    locations = history_of().locate(rows(2, 7))
    assert not locations.knows_gradients
    _ = locations.on_displacements
    assert not locations.knows_gradients
    _ = locations.on_gradients
    assert locations.knows_gradients


@pytest.mark.parametrize("asked", [[], ["offsets"], *([name] for name in KNOWN), KNOWN])
@pytest.mark.parametrize("index", [0, 2])
def test_one_of_several_points_takes_along_what_is_known(index, asked, counted):
    history, points = history_of(), rows(3, 7)
    locations = history.locate(points)
    for name in asked:
        _ = getattr(locations, name)
    counted.clear()
    one = locations[index]
    assert one.knows_gradients == ("on_gradients" in asked)
    assert one.history is history
    assert_located(one, history, points[index : index + 1])
    expected = {"on_gradients": 0, "on_displacements": 1}
    assert len(counted) == min((expected[name] for name in asked if name in expected), default=3)


def test_one_of_several_points_shares_their_offsets():
    locations = history_of().locate(rows(3, 7))
    whole, one = locations.offsets, locations[1].offsets
    assert one.data_ptr() == whole[1].data_ptr()


@pytest.mark.parametrize("asked", [([], []), (KNOWN, KNOWN), (KNOWN, []), ([], KNOWN), (KNOWN[:1], [])])
def test_parts_that_are_joined_bring_what_is_known_of_any(asked, counted):
    history, points = history_of(), rows(3, 7)
    parts = [history.locate(points[:2]), history.locate(points[2:])]
    for part, names in zip(parts, asked, strict=True):
        for name in names:
            _ = getattr(part, name)
    whole = Locations.joined(parts, points)
    counted.clear()
    assert whole.history is history
    assert whole.knows_gradients == any("on_gradients" in names for names in asked)
    assert_located(whole, history, points)
    known = {name for names in asked for name in names}
    assert len(counted) == {0: 3, 1: 1, 2: 0}[len(known)]


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("with_offsets", [True, False])
def test_what_is_handed_over_is_not_looked_for(with_offsets, with_gradients, counted):
    history, points = history_of(), rows(2, 7)
    found = history.locate(points)
    offsets = found.offsets if with_offsets else None
    on_gradients = found.on_gradients if with_gradients else None
    norms, products = found.norms, found.on_displacements
    counted.clear()
    locations = Locations.known(history, points, offsets, norms, products, on_gradients)
    assert locations.knows_gradients == with_gradients
    assert locations.history is history
    assert_located(locations, history, points)
    assert len(counted) == (not with_gradients)
    if with_offsets:
        assert locations.offsets is offsets


def test_a_stored_iterate_is_located_for_nothing(counted):
    history = history_of()
    for stale in (True, False):
        for slot in range(3):
            point = history.reference + history.displacements[slot]
            counted.clear()
            locations = history.locate_stored(slot, point)
            assert torch.equal(locations.offsets, history.displacements[slot : slot + 1])
            assert locations.knows_gradients != stale
            assert_located(locations, history, point[None])
            assert len(counted) == stale
        _ = history.cross_gram  # brought up to date


def test_an_iterate_that_is_stored_in_fewer_digits_is_located_anew():
    history = history_of(torch.float32)
    point = rows(3, 0)[1]
    locations = history.locate_stored(1, point)
    assert torch.equal(locations.points, point[None])
    assert locations.offsets.dtype == torch.float64
    assert torch.equal(locations.offsets, (point - history.reference)[None])
