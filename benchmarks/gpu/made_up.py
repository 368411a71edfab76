"""Data in the shape of the real data sets, for machines without them: a step takes as long."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from optex.studies.problems import CIFAR10, FashionMNIST, Problem, Shakespeare
from optex.studies.problems.data import Split

_IMAGES = {"train": 4000, "test": 500}
_CHARACTERS = 1_100_000


@cache
def _images(channels: int, side: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a bright stripe where the class says, so that there is something to learn."""
    generator = np.random.default_rng(len(split))
    count = _IMAGES[split]
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    pixels = generator.integers(0, 106, (count, channels, side, side), dtype=np.uint8)
    rows = np.arange(side) // 2 == labels[:, None]  # [n, side]
    return pixels + (100 * rows).astype(np.uint8)[:, None, :, None], labels


@cache
def _text() -> tuple[Tensor, Tensor, int]:
    """A random walk on 65 characters: the last one says much of the next."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (_CHARACTERS,), generator=generator)
    codes = steps.cumsum(0) % 65
    return codes[: -_CHARACTERS // 10], codes[-_CHARACTERS // 10 :], 65


class MadeUpCIFAR10(CIFAR10):  # type: ignore[misc]  # final for users
    """With stripes for photographs."""

    def _arrays(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        return _images(3, 32, split)


class MadeUpFashionMNIST(FashionMNIST):  # type: ignore[misc]
    """With stripes for clothes."""

    def _arrays(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        return _images(1, 28, split)


class MadeUpShakespeare(Shakespeare):  # type: ignore[misc]
    """With a random walk for plays."""

    @staticmethod
    def _text() -> tuple[Tensor, Tensor, int]:
        return _text()


STAND_INS: dict[str, type[Problem]] = {
    "cifar10": MadeUpCIFAR10,
    "fashion-mnist": MadeUpFashionMNIST,
    "shakespeare": MadeUpShakespeare,
}
