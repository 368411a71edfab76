"""Random numbers: each step has its own, and draws the same ones each time it is evaluated.

Evaluators differ only in where the numbers of a new step start:

=============  =====================================================================================
in turn        where torch's generators stand, as in the plain loop: ``RandomDraws.replayed``
in workers     at the same place, foreseen from how many numbers the last evaluation drew:
               :mod:`optex.evaluators.workers.foresight`
across ranks   at a seed of the step's own, which every rank knows without asking: ``seeded_states``
vectorized     nowhere: ``torch.func.vmap`` draws for all points at once, anew each time
=============  =====================================================================================
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor

from optex.draws import generator_states, set_generator_states

__all__ = ["RandomDraws", "generator_states", "seeded_states", "set_generator_states"]


# Replays set torch's generators, which all threads of the program share: one at a time.
_REPLAYING: Final = threading.RLock()


class RandomDraws:
    """The random numbers of a step, such as dropout's: the same ones each time the step is evaluated.

    A step that drew none at its first evaluation never touches the generators again. All threads share torch's
    generators: where objectives of several threads draw, a step may get other numbers the second time.

    Attributes:
        state: of torch's generators before the first evaluation: the CPU's, then every CUDA device's if CUDA is
            in use; None until then.
    """

    def __init__(self, state: list[Tensor] | None = None) -> None:
        self.state = state
        self._none_drawn = False

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The context to evaluate the step in.

        The first evaluation draws from torch's generators as they stand and moves them on, as the plain loop
        does; if it fails, they are put back. A later evaluation starts from the remembered state and leaves the
        generators as they were.
        """
        if self._none_drawn:
            yield
        elif self.state is None:
            now = generator_states()
            try:
                yield
            except BaseException:
                if not _equal(now, generator_states()):
                    set_generator_states(now)
                raise
            self._none_drawn = _equal(now, generator_states())
            self.state = now
        else:
            with _REPLAYING:
                now = generator_states()
                try:
                    set_generator_states(self.state)
                    yield
                finally:
                    set_generator_states(now)

    def held(self) -> tuple[list[Tensor] | None, bool]:
        """What is remembered now, for ``put_back``."""
        return self.state, self._none_drawn

    def put_back(self, held: tuple[list[Tensor] | None, bool]) -> None:
        """Remember again what ``held`` returned."""
        self.state, self._none_drawn = held

    def apart(self, part: int) -> RandomDraws:
        """Draws for one part of the step's batch, as parts must not share their dropout; part 0 has the step's.

        Args:
            part: its index, from 0.
        """
        if not part or self.state is None:
            return self
        generator = torch.Generator()
        generator.set_state(self.state[0])
        return RandomDraws(seeded_states([generator.initial_seed(), part]))


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def seeded_states(entropy: Sequence[int]) -> list[Tensor]:
    """States of torch's generators, the CPU's and those of CUDA devices in use, seeded by several numbers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    generators = [torch.Generator(), *(torch.Generator(f"cuda:{i}") for i in range(devices))]
    return [generator.manual_seed(seed).get_state() for generator in generators]
