"""Foresees where the random numbers of each evaluation start, so that no evaluation waits for another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from optex.evaluators.randomness import RandomDraws, generator_states
from optex.evaluators.workers.messages import Answer, Outcome

__all__ = ["DrawForesight"]

_MOST_DRAWS: Final = 2**24  # random numbers an evaluation may draw and still be foreseen


class DrawForesight:
    """Predicts how many random numbers an evaluation draws, and finds the evaluations it was wrong about.

    If they were evaluated in turn, each new step would draw its numbers (dropout's, for one) from where the
    step before it left torch's generator. Steps evaluated at once have to start before that place is known. So
    each is predicted to draw as many numbers as the evaluation last seen: the k-th new step starts from the
    generator advanced k times by that count. After the evaluations the true places are known; steps that
    started from another state are evaluated again from the right one. The draws are then those of evaluations
    in turn, to the bit, and an objective that always draws the same number of times is evaluated again in the
    first round only.

    Steps that were evaluated in an earlier round start from the state that they had there, and move nothing.
    """

    def __init__(self) -> None:
        self._count: int | None = 0  # random numbers that an evaluation draws; None: too many to count

    def starts(self, draws: Sequence[RandomDraws]) -> list[Tensor]:  # n states
        """The state of torch's generator that each step starts from; for new steps, as predicted."""
        starts = [torch.empty(0) if drawn.state is None else drawn.state[0] for drawn in draws]
        state = torch.get_rng_state()
        for i in _new(draws):
            starts[i] = state
            state = _advanced(state, self._count)
        return starts

    def mistaken(
        self,
        draws: Sequence[RandomDraws],
        starts: list[Tensor],  # n states
        outcomes: Sequence[Outcome],
    ) -> list[int]:
        """Indices of the new steps that started from a wrong state; ``starts`` gets a better one for each.

        Args:
            draws: of the n steps.
            starts: where they started; corrected in place.
            outcomes: n, of their evaluations.
        """
        new = _new(draws)
        for position, (before, here) in enumerate(pairwise(new)):
            end = _end(starts[before], outcomes[before])
            if end is None or torch.equal(starts[here], end):
                continue
            if self._count is not None:
                self._count = _draws_between(starts[before], end)
            for i in new[position + 1 :]:
                starts[i] = end
                end = _advanced(end, self._count)
            return new[position + 1 :]
        return []

    @staticmethod
    def pin(
        draws: Sequence[RandomDraws],
        starts: Sequence[Tensor],  # n states
        outcomes: Sequence[Outcome],
    ) -> None:
        """Fix the new steps' states for good, and move torch's generator past the numbers of the last."""
        new = _new(draws)
        others = generator_states()[1:]
        for i in new:
            draws[i].state = [starts[i], *others]
        if new:
            end = _end(starts[new[-1]], outcomes[new[-1]])
            end = starts[new[-1]] if end is None else end
            # If nothing was drawn the generator is not set: another thread may have drawn from it meanwhile.
            if not torch.equal(end, starts[new[0]]):
                torch.set_rng_state(end)


def _new(draws: Sequence[RandomDraws]) -> list[int]:
    """The steps that are evaluated for the first time."""
    return [i for i, drawn in enumerate(draws) if drawn.state is None]


def _end(start: Tensor, outcome: Outcome) -> Tensor | None:  # a state
    """The state in which an evaluation left the generator; None if it got no answer."""
    if not isinstance(outcome, Answer):
        return None
    return start if outcome.generator is None else torch.tensor(outcome.generator)


def _advanced(state: Tensor, count: int | None) -> Tensor:  # a state
    """The state of torch's CPU generator after ``count`` more random numbers."""
    if not count:
        return state
    generator = torch.Generator()
    generator.set_state(state)
    torch.empty(count, dtype=torch.int32).random_(generator=generator)
    return generator.get_state()


def _draws_between(start: Tensor, end: Tensor) -> int | None:
    """How many random numbers lie between two states; None where they are more than are counted.

    The generator is a Mersenne twister: its state is 624 numbers, made anew when they are used up, and the
    position in them.
    """
    position = [int(state.view(torch.int64)[2]) for state in (start, end)]
    count = (position[1] - position[0]) % 624
    state = _advanced(start, count)
    while not torch.equal(state, end):
        count += 624
        if count > _MOST_DRAWS:
            return None
        state = _advanced(state, 624)
    return count
