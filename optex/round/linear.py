"""Rounds of a base optimizer that is linear in the gradients: small algebra, and one product at the end.

Every point of such a draft is a combination of the rows of the history and of a few other vectors (its start,
the momentum). Predictions need inner products alone, and those of a combination follow from those of its parts.
So the history is read once for its inner products with the other vectors, and once to compute the points,
however many steps there are. A replay needs no more than the history itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from optex import small
from optex.estimators import Posterior
from optex.estimators.history import GradientHistory, Locations
from optex.linalg import accumulate_rows, combine_rows
from optex.round.record import RoundRecord
from optex.small import Array, array, tensor
from optex.stepping import LinearRule

__all__ = ["draft_linearly", "linear_replay", "linear_rule"]

# Large coefficients that cancel amplify the rounding of inner products more than vectors do, and ever more in a
# long draft. On short vectors the base optimizer's own steps take no longer.
LONGEST: Final = 16  # steps of a draft
SHORTEST: Final = 4097  # numbers in a vector


class _Basis:
    """The rows of a history, gradients first, and m other vectors; a combination has 2 T0 + m numbers."""

    def __init__(
        self,
        history: GradientHistory,
        beside: Tensor,  # [m, d]
    ) -> None:
        self._history, self._beside = history, beside
        space, size = history.space, 2 * history.size
        rows = history.gradients, history.displacements
        onto = small.concatenate([array(space.inner_products(part, beside)) for part in rows])  # [2 T0, m]
        self.gram = small.full((size + len(beside),) * 2, 0.0, onto)
        self.gram[:size, :size], self.gram[:size, size:] = history.row_gram, onto
        self.gram[size:, :size] = onto.T
        self.gram[size:, size:] = array(space.inner_products(beside, beside))

    def unit(self, number: int) -> Array:  # [2 T0 + m]
        """A stored gradient (from 0), a stored displacement (from T0), or a vector beside them (from 2 T0)."""
        values = 0 * self.gram[0]
        values[number] = 1.0
        return values

    def locate(
        self,
        combination: Array,  # [2 T0 + m], of an offset from the anchor
        point: Tensor,  # [1, d], where that will be written
    ) -> Locations:
        """The point's inner products with the history, from those of the basis."""
        size, products = self._history.size, (self.gram @ combination)[None]
        norm = small.nonnegative((products * combination).sum(1))
        return Locations.known(
            self._history, point, None, norm, products[:, size : 2 * size], products[:, :size]
        )

    def predict(
        self,
        posterior: Posterior,
        here: Locations,
        combination: Array,  # [2 T0 + m]
    ) -> Array:  # [2 T0 + m]
        """The prediction μ at a point, as a combination."""
        coefficients, size = posterior.coefficients(here), self._history.size
        slope = 0.0 if coefficients.on_offsets is None else coefficients.on_offsets[0]
        result = slope * combination
        result[:size] += coefficients.on_gradients[0]
        if coefficients.on_displacements is not None:
            result[size : 2 * size] += coefficients.on_displacements[0]
        return result

    def written(
        self,
        combinations: Array,  # [n, 2 T0 + m]
    ) -> Tensor:  # [n, d]
        """The vectors that the combinations stand for."""
        history, size = self._history, self._history.size
        result = combine_rows(tensor(combinations[:, :size]), history.gradients)
        accumulate_rows(result, tensor(combinations[:, size : 2 * size]), history.displacements)
        accumulate_rows(result, tensor(combinations[:, 2 * size :]), self._beside)
        return result

    def length(
        self,
        combination: Array,  # [2 T0 + m]
    ) -> float:
        """Length of the vector that the combination stands for."""
        return float(small.nonnegative(combination @ self.gram @ combination)) ** 0.5


def _basis(
    history: GradientHistory, rule: LinearRule, vectors: list[Tensor]
) -> tuple[_Basis, Array | None, Array]:
    """A basis of the history's rows, these vectors, the momentum and the anchor; and the last two in it."""
    count, first = len(vectors), 2 * history.size
    if rule.buffer is not None:
        vectors = [*vectors, rule.buffer]
    if rule.weight_decay:
        vectors = [*vectors, history.reference]
    rows = history.gradients
    beside = torch.stack([v.to(rows.dtype) for v in vectors]) if vectors else rows[:0]
    basis = _Basis(history, beside)
    buffer = None if rule.buffer is None else basis.unit(first + count)
    anchor = basis.unit(first + len(vectors) - 1) if rule.weight_decay else 0 * basis.gram[0]
    return basis, buffer, anchor


def linear_rule(record: RoundRecord, posterior: Posterior | None) -> LinearRule | None:
    """The linear rule to draft by; None where there is none, or inner products are too slow or too inexact."""
    vector, last = record.stepper.vector, record.positions[-1]
    if posterior is None or not last or posterior.history.space.is_split:
        return None
    rows = posterior.history.displacements
    if rows.dtype != vector.dtype or rows.device != vector.device:
        return None
    if last > LONGEST or rows.shape[1] < SHORTEST:
        return None
    return record.stepper.linear_rule()


def draft_linearly(
    record: RoundRecord,
    posterior: Posterior,
    rule: LinearRule,
    origins: Mapping[int, Locations],
) -> None:
    """Fill the record's proxies, predictions and drafted gradients as the base optimizer's own steps would.

    Args:
        record: of the round; its first proxy is set.
        posterior: of the history.
        rule: of the base optimizer's steps.
        origins: by row, where steps were measured before.
    """
    history, window = posterior.history, record.window
    held = {row: pair for row in origins if row < len(window) - 1 and (pair := window[row].measured)}
    vectors = [history.displacement(record.proxies[0])]
    for row, (_, gradient) in held.items():
        vectors += [origins[row].offsets[0], gradient]
    basis, buffer, anchor = _basis(history, rule, vectors)
    first = 2 * history.size  # of the vectors beside the history
    at = {row: first + 1 + 2 * i for i, row in enumerate(held)}
    offset, points, gradients, rows, row = basis.unit(first), [], [], [], 0
    for position in range(record.positions[-1]):
        here = basis.locate(offset, record.proxies[row : row + 1])
        gradient = basis.predict(posterior, here, offset)
        if record.positions[row] == position:
            record.predicted.append(row)
            record.located[row] = here
            if row not in at:
                record.note_distance(row, here)
            else:
                origin = basis.unit(at[row])
                gradient = gradient - basis.predict(posterior, origins[row], origin) + basis.unit(at[row] + 1)
            rows.append(row)
            gradients.append(gradient)
            row += 1
        moved, buffer = rule.step(anchor + offset, gradient, buffer)
        offset = moved - anchor
        if record.positions[row] == position + 1:
            points.append(offset)
    written = basis.written(small.concatenate([values[None] for values in (*points, *gradients)]))
    reference = history.reference
    record.proxies[1:] = reference + written[: len(points)]
    record.drafted[: len(rows)] = written[len(points) :]
    record.located[row] = basis.locate(offset, record.proxies[row : row + 1])


def linear_replay(record: RoundRecord) -> LinearReplay | None:
    """A replay by small algebra; None where the base optimizer is not linear, or a measured pair not stored."""
    posterior = record.posterior
    rule = linear_rule(record, posterior)
    usable = [row for row, flag in enumerate(record.usable) if flag]
    if rule is None or posterior is None or any(row not in record.slots for row in usable):
        return None
    return LinearReplay(record, posterior, rule)


class LinearReplay:
    """A replay whose points are combinations of the history's rows, which hold all that was measured."""

    def __init__(self, record: RoundRecord, posterior: Posterior, rule: LinearRule) -> None:
        history = posterior.history
        self._record, self._posterior, self._rule, self._size = record, posterior, rule, history.size
        self._basis, self._buffer, self._anchor = _basis(history, rule, [])
        self._offset = self._before = self._proxy(0)
        self._gradient = self._basis.unit(record.slots[0])
        self.taken: int = 0
        self.step(self._gradient, measured=True)

    def _proxy(self, row: int) -> Array:  # [2 T0 + m]
        return self._basis.unit(self._size + self._record.slots[row])

    def lengths(self, rows: list[int]) -> tuple[float, list[float]]:
        step = self._basis.length(self._offset - self._before)
        self._before = self._offset
        return step, [self._basis.length(self._offset - self._proxy(row)) for row in rows]

    def _mean(self, combination: Array) -> Array:  # [2 T0 + m]
        here = self._basis.locate(combination, self._record.proxies[:1])
        return self._basis.predict(self._posterior, here, combination)

    def corrected(self, row: int, gap: float) -> Array:
        gradient = self._basis.unit(self._record.slots[row])
        if not gap > 0:
            return gradient
        return gradient + (self._mean(self._offset) - self._mean(self._proxy(row)))

    def predicted(self) -> tuple[Array, float]:
        self._before = self._offset
        gradient = self._mean(self._offset)
        return gradient, self._basis.length(gradient)

    def step(self, gradient: Array, *, measured: bool) -> None:
        del measured  # it has no state to freeze
        moved, self._buffer = self._rule.step(self._anchor + self._offset, gradient, self._buffer)
        self._offset, self._gradient = moved - self._anchor, gradient
        self.taken += 1

    def finish(self) -> None:
        stepper, history = self._record.stepper, self._posterior.history
        if self.taken == 1:
            stepper.step(self._record.gradients[0])  # to the last digit
            return
        vectors = [self._offset, self._gradient] + ([] if self._buffer is None else [self._buffer])
        offset, gradient, *buffer = self._basis.written(small.concatenate([v[None] for v in vectors]))
        state = {"momentum_buffer": buffer[0]} if buffer else {}
        stepper.arrive(history.reference + offset, gradient, state, self.taken)
