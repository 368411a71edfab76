"""How wrong predictions are, from inner products alone: no prediction is written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optex import small
from optex.estimators.arrivals import Arrivals
from optex.estimators.history import GradientHistory
from optex.estimators.interface import Coefficients, Posterior
from optex.linalg import product_rounding
from optex.small import Array, array, tensor

__all__ = ["squared_errors"]


def squared_errors(
    posteriors: Sequence[Posterior],
    arrivals: Arrivals,
    held: Sequence[tuple[Tensor, Tensor] | None],  # n
) -> Tensor:  # [posteriors, n] float64
    """‖μ(x_i) - g_i‖² of pairs that the posteriors, all of one history, have not seen.

    A prediction is a combination of the stored rows and of the point's offset, and its error one of these and
    of the gradient; so its squared length needs inner products alone, most of which remembering the pairs needs
    anyway. For a step that was measured at x' before (``held``) the predicted difference is judged:
    ‖g' + μ(x_i) - μ(x') - g_i‖². Values below the rounding of the products are raised to it.

    Args:
        posteriors: all of one history.
        arrivals: the pairs.
        held: (x', g') for the pairs that have them, None for the others.
    """
    history, locations = arrivals.history, arrivals.locations
    assert isinstance(history, GradientHistory)
    gram = history.row_gram
    here = [posterior.coefficients(locations) for posterior in posteriors]
    known = {row: pair for row, pair in enumerate(held) if pair is not None}
    before, there = None, []
    if known:
        points, gradients = (torch.stack(rows) for rows in zip(*known.values(), strict=True))
        before = Arrivals(history, points, gradients)
        there = [posterior.coefficients(before.locations) for posterior in posteriors]
    found = []
    for i in range(len(arrivals)):
        on_rows, beside = _combination(here, i, gram)
        onto, among = _vectors(arrivals, i)
        if i in known and before is not None:
            k = list(known).index(i)
            less, elsewhere = _combination(there, k, gram)
            on_rows, beside = on_rows - less, small.concatenate([beside.T, -elsewhere.T]).T
            onto = small.concatenate([onto, _vectors(before, k)[0]])
            among = _among(arrivals, i, before, k)
        found.append(_squares(on_rows, beside, gram, onto, among, product_rounding(arrivals.gradients)))
    return tensor(small.concatenate([row[None] for row in found]).T)


def _combination(members: Sequence[Coefficients], row: int, like: Array) -> tuple[Array, Array]:
    """Errors at one point by member: coefficients on the rows [m, 2 T0], and on offset and gradient [m, 2]."""
    size = len(like) // 2
    on_rows = small.full((len(members), 2 * size), 0.0, like)
    beside = small.full((len(members), 2), -1.0, like)
    for m, member in enumerate(members):
        on_rows[m, :size] = member.on_gradients[row]
        if member.on_displacements is not None:
            on_rows[m, size:] = member.on_displacements[row]
        beside[m, 0] = 0.0 if member.on_offsets is None else member.on_offsets[row]
    return on_rows, beside


def _vectors(arrivals: Arrivals, row: int) -> tuple[Array, Array]:  # [2, 2 T0], [2, 2]
    """Inner products of a pair's offset and gradient with the rows, and among themselves."""
    locations = arrivals.locations
    offset = small.concatenate([locations.on_gradients[row], locations.on_displacements[row]])
    gradient = small.concatenate([arrivals.on_gradients[row], arrivals.on_displacements[row]])
    among = small.full((2, 2), 0.0, offset)
    among[0, 0], among[1, 1] = arrivals.offsets_among[row, row], arrivals.gradients_among[row, row]
    among[0, 1] = among[1, 0] = arrivals.mixed_among[row, row]
    return small.concatenate([offset[None], gradient[None]]), among


def _among(arrivals: Arrivals, row: int, before: Arrivals, other: int) -> Array:  # [4, 4]
    pairs = [(arrivals, row), (before, other)]
    vectors = [rows[i] for part, i in pairs for rows in (part.locations.offsets, part.gradients)]
    stacked = torch.stack([vector.to(vectors[0].device, vectors[0].dtype) for vector in vectors])
    return array(arrivals.history.space.inner_products(stacked, stacked))


def _squares(
    on_rows: Array,  # [m, 2 T0]
    beside: Array,  # [m, e]
    gram: Array,  # [2 T0, 2 T0]
    onto: Array,  # [e, 2 T0]
    among: Array,  # [e, e]
    rounding: float,
) -> Array:  # [m]
    own = ((on_rows @ gram) * on_rows).sum(1)
    squares = own + 2 * ((beside @ onto) * on_rows).sum(1) + ((beside @ among) * beside).sum(1)
    terms = abs(on_rows) @ small.sqrt(gram.diagonal()) + abs(beside) @ small.sqrt(among.diagonal())
    return small.maximum(squares, rounding * terms * terms)
