"""Noise in units of the prior's variance, against the formula pair by pair."""

import math

import numpy as np
import pytest
import torch

from optex import GradientHistory, small
from optex.estimators.noise import LARGEST, relative_noise


def history_of(gradients, noise=None, *, places=None, size=None):
    """Pairs of these gradients [n, d] at places of their own, or at these."""
    history = GradientHistory(size or len(gradients), gradients.shape[1])
    points = torch.arange(float(len(gradients))) if places is None else torch.tensor(places)
    history.append(points.double()[:, None].expand_as(gradients).contiguous(), gradients, noise)
    return history


def correlations_of(count, correlation):
    return np.eye(count) + correlation * (1 - np.eye(count))


def by_pairs(gradients, noise, correlations, assumed):
    """E ‖g_i - g_j‖² / d = 2 s² (1 - c_ij) + v_i + v_j, summed over i < j and solved for s²."""
    count, dimension = gradients.shape
    excess = spread = 0.0
    for i in range(count):
        for j in range(i + 1, count):
            gap = float((gradients[i] - gradients[j]).square().sum())
            excess += gap / dimension - noise[i] - noise[j]
            spread += 2 * (1 - correlations[i, j])
    variance = max(excess / spread, max(noise) / LARGEST)
    return [max(assumed, v / variance) for v in noise]


@pytest.mark.parametrize("assumed", [1e-6, 0.05])
@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.99])
def test_noise_that_is_told_is_put_in_units_of_the_spread_of_the_gradients(correlation, assumed):
    generator = torch.Generator().manual_seed(0)
    gradients = 3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    noise, correlations = [0.5, 0.0, 2.0, 0.1], correlations_of(4, correlation)
    correlations[0, 1] = correlations[1, 0] = (0.2 + correlation) / 2
    history, slots = history_of(gradients, noise), [0, 1, 2, 3]
    expected = by_pairs(gradients, noise, correlations, assumed)
    assert relative_noise(history, slots, correlations, assumed) == pytest.approx(expected, rel=1e-12)
    with small.tensors():
        found = relative_noise(history, slots, torch.from_numpy(correlations), assumed)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_slots_of_several_pairs_have_the_noise_of_their_mean():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    history = history_of(gradients, [0.5, 0.1, 0.5, 0.2], places=[0.0, 1.0, 0.0, 2.0], size=6)
    merged = torch.stack([gradients[1], (gradients[0] + gradients[2]) / 2, gradients[3]])
    assert history.representatives == [1, 2, 3]
    correlations = correlations_of(3, 0.3)
    ours = relative_noise(history, [1, 2, 3], correlations, 1e-6)
    assert ours == pytest.approx(by_pairs(merged, [0.1, 0.25, 0.2], correlations, 1e-6), rel=1e-12)


def test_noise_that_nobody_told_is_what_is_assumed_of_a_mean():
    gradients = torch.eye(4, 3, dtype=torch.float64)
    for noise in (None, [math.nan] * 4):
        history = history_of(gradients, noise, places=[0.0, 1.0, 0.0, 0.0])
        ours = relative_noise(history, [1, 3], correlations_of(2, 0.5), 0.3)
        assert ours == pytest.approx([0.3, 0.1])


def test_a_pair_of_unknown_noise_among_others_has_what_is_assumed():
    generator = torch.Generator().manual_seed(2)
    gradients = 3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    correlations = correlations_of(3, 0.5)
    ours = relative_noise(history_of(gradients, [0.5, math.nan, 0.2]), [0, 1, 2], correlations, 0.01)
    expected = by_pairs(gradients, [0.5, 0.0, 0.2], correlations, 0.01)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert ours[1] == 0.01


@pytest.mark.parametrize(
    ("scale", "correlation", "count"),
    [(1e-3, 0.5, 3), (3.0, 1.0, 3), (3.0, 0.5, 1)],
    ids=["spread is all noise", "one place to the kernel", "one pair"],
)
def test_noise_is_at_most_a_thousand_times_the_prior(scale, correlation, count):
    generator = torch.Generator().manual_seed(3)
    gradients = scale * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    noise = [0.5, 2.0, 1.0][:count]
    ours = relative_noise(
        history_of(gradients, noise), list(range(count)), correlations_of(count, correlation), 1e-6
    )
    assert ours == pytest.approx([LARGEST * v / max(noise) for v in noise])
