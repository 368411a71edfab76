"""Foresees where the random numbers of each evaluation start, so that evaluations need not wait in turn."""

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
    """Predicts how many random numbers an evaluation draws, and names the evaluations that were mistaken.

    One after the other, each new step would draw (dropout's numbers, say) where the step before it left
    torch's generator. Evaluated at once, they have to start before that is known. So each is predicted to draw
    as many numbers as the evaluation last seen: the k-th new step starts from the generator advanced k times
    by that count. After the evaluations the true positions are known; steps that started from another state
    are evaluated again from the right one. The draws are then those of the loop in turn, to the bit, and an
    objective that always draws the same number of times is evaluated again in the first round only.

    Steps that were evaluated in an earlier round start from the state that they had there, and move nothing.
    """

    def __init__(self) -> None:
        self._count: int | None = 0  # random numbers that an evaluation draws; None: cannot be told

    def starts(self, draws: Sequence[RandomDraws]) -> list[Tensor]:  # n states
        """The state of torch's generator that each step starts from, for new ones as predicted."""
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
        """The new steps that started from a wrong state; ``starts`` now has a better one for each."""
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
        """Fix the new steps' states for good, and move the generator behind the last of them."""
        new = _new(draws)
        others = generator_states()[1:]
        for i in new:
            draws[i].state = [starts[i], *others]
        if new:
            end = _end(starts[new[-1]], outcomes[new[-1]])
            end = starts[new[-1]] if end is None else end
            # If nothing was drawn it is left alone: another thread of the program may have drawn meanwhile.
            if not torch.equal(end, starts[new[0]]):
                torch.set_rng_state(end)


def _new(draws: Sequence[RandomDraws]) -> list[int]:
    """The steps that are evaluated for the first time."""
    return [i for i, drawn in enumerate(draws) if drawn.state is None]


def _end(start: Tensor, outcome: Outcome) -> Tensor | None:  # a state
    """Where an evaluation left the generator; None if it was lost."""
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
    """How many random numbers lie between two states; None where that cannot be told.

    The generator is a Mersenne twister: 624 numbers, made anew when used up, and the position in them.
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
