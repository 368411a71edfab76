"""Random matrices R [s, d] with E[RᵀR] = I, applied without being written down."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MATRICES", "RandomMatrix", "walsh_hadamard"]

# Entries of a dense R that are drawn at a time.
_BLOCK: Final = 1 << 20
# 2³¹ - 1: products of two residues fit into 64 bits.
_PRIME: Final = (1 << 31) - 1


class RandomMatrix(ABC):
    """R [s, d], a function of its sizes and of the seed's parts alone: any device, any dtype.

    Args:
        size: s.
        dimension: d, at least s.
        entropy: the parts of the seed.
    """

    def __init__(self, size: int, dimension: int, entropy: tuple[int, ...]) -> None:
        self.size = size
        self.dimension = dimension
        self.words: np.random.SeedSequence = np.random.SeedSequence(entropy)

    @abstractmethod
    def forward(
        self,
        vectors: Tensor,  # [..., d], float32 or float64
    ) -> Tensor:  # [..., s]
        """R g; autograd goes through."""

    @abstractmethod
    def adjoint(
        self,
        sketched: Tensor,  # [..., s], float32 or float64
    ) -> Tensor:  # [..., d]
        """Rᵀ y; autograd goes through."""

    @staticmethod
    @abstractmethod
    def second_moment(size: int, dimension: int) -> float:
        """E‖RᵀR g‖² / ‖g‖², the same for every g."""

    def generator(self) -> torch.Generator:
        """This matrix's generator, on the CPU: its numbers do not depend on the device of the vectors."""
        seed = int(self.words.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator().manual_seed(seed)

    def polynomials(self, count: int, degree: int) -> NDArray[np.int64]:  # [count, degree + 1] int64
        """Coefficients of random polynomials modulo a prime: (degree + 1)-wise independent hash functions."""
        return np.random.default_rng(self.words).integers(_PRIME, size=(count, degree + 1), dtype=np.int64)


class _Dense(RandomMatrix):
    """Made block by block, the same blocks in the same order every time: O(s d) work, a block of memory."""

    @abstractmethod
    def blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:  # [s, w]
        """Where each block's columns begin, and the block times √s."""

    def forward(self, vectors: Tensor) -> Tensor:
        total = vectors.new_zeros((*vectors.shape[:-1], self.size))
        for start, block in self.blocks(vectors):
            total = total + vectors[..., start : start + block.shape[1]] @ block.T
        return total / self.size**0.5

    def adjoint(self, sketched: Tensor) -> Tensor:
        return torch.cat([sketched @ block for _, block in self.blocks(sketched)], -1) / self.size**0.5

    def columns(self) -> Iterator[range]:
        """The columns of each block."""
        width = max(1, _BLOCK // self.size)
        for start in range(0, self.dimension, width):
            yield range(start, min(start + width, self.dimension))


class Gaussian(_Dense):
    """Independent N(0, 1/s)."""

    def blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        generator = self.generator()
        for columns in self.columns():
            # In float32 for all: a client in one precision and a server in another share the matrix.
            yield columns.start, torch.randn(self.size, len(columns), generator=generator).to(like)

    @staticmethod
    def second_moment(size: int, dimension: int) -> float:
        # E (RᵀR)² = (d + s + 1) / s I, of Wishart matrices.
        return 1 + (dimension + 1) / size


class AMS(_Dense):
    """Signs ±1/√s, a 4-wise independent hash function a row: 4 s numbers are the whole matrix."""

    def blocks(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        coefficients = torch.from_numpy(self.polynomials(self.size, 3)).to(like.device)[:, :, None]
        for columns in self.columns():
            places = torch.arange(columns.start, columns.stop, device=like.device)
            yield columns.start, _signs(coefficients, places).to(like)

    @staticmethod
    def second_moment(size: int, dimension: int) -> float:
        # Four-wise independence is all that E (RᵀR)² = (1/s²) (s d + s (s - 1)) I needs.
        return 1 + (dimension - 1) / size


class CountSketch(RandomMatrix):
    """One sign a column, in a random row: O(d)."""

    def forward(self, vectors: Tensor) -> Tensor:
        rows, signs = self._entries(vectors)
        empty = vectors.new_zeros((*vectors.shape[:-1], self.size))
        return empty.index_add(-1, rows, signs * vectors)

    def adjoint(self, sketched: Tensor) -> Tensor:
        rows, signs = self._entries(sketched)
        return signs * sketched[..., rows]

    def _entries(self, like: Tensor) -> tuple[Tensor, Tensor]:  # [d] int64, [d]
        places = torch.arange(self.dimension, device=like.device)
        coefficients = torch.from_numpy(self.polynomials(2, 3)).to(like.device)[:, :, None]
        return _hashed(coefficients[0], places) % self.size, _signs(coefficients[1], places).to(like)

    @staticmethod
    def second_moment(size: int, dimension: int) -> float:
        # ‖RᵀR g‖² = Σ_b n_b (R g)_b², n_b columns in row b; E of it is Σ_i g_i² (1 + (d - 1) / s).
        return 1 + (dimension - 1) / size


class SRHT(RandomMatrix):
    """√(D/s) S H diag(±1): random signs, a Walsh-Hadamard transform of length D, s of its rows: O(d log d).

    D is the least power of 2 that is not below d. Rows are drawn without replacement: with s = d = D it is a
    rotation.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        signs, rows, scale = self._parts(vectors)
        padded = torch.nn.functional.pad(signs * vectors, (0, self._length - self.dimension))
        return scale * walsh_hadamard(padded)[..., rows]

    def adjoint(self, sketched: Tensor) -> Tensor:
        signs, rows, scale = self._parts(sketched)
        spread = sketched.new_zeros((*sketched.shape[:-1], self._length)).index_add(-1, rows, sketched)
        return scale * signs * walsh_hadamard(spread)[..., : self.dimension]

    @property
    def _length(self) -> int:  # D
        return _power_of_2(self.dimension)

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor, float]:  # [d], [s], √(D/s)
        generator = self.generator()
        signs = 2 * torch.randint(2, (self.dimension,), generator=generator) - 1
        rows = torch.randperm(self._length, generator=generator)[: self.size]
        return signs.to(like), rows.to(like.device), (self._length / self.size) ** 0.5

    @staticmethod
    def second_moment(size: int, dimension: int) -> float:
        # The s rows h_k by themselves give d/s. Pairs of them, s (s - 1) of D (D - 1), add what padding leaves
        # of their products on the first d coordinates: Σ_{k≠l} E (h_k·g)(h_l·g)(h_k·P h_l) = (1 - d/D) ‖g‖².
        length = _power_of_2(dimension)
        pairs = (size - 1) * (length - dimension) / (size * (length - 1)) if length > 1 else 0.0
        return dimension / size + pairs


MATRICES: Final[dict[str, type[RandomMatrix]]] = {
    "gaussian": Gaussian,
    "srht": SRHT,
    "count": CountSketch,
    "ams": AMS,
}


def walsh_hadamard(
    values: Tensor,  # [..., n], n a power of 2
) -> Tensor:  # [..., n]
    """H x / √n, H the symmetric matrix of signs (-1)^(bits that i and j share); its own inverse."""
    count, half, found = values.shape[-1], 1, values
    while half < count:
        pairs = found.unflatten(-1, (count // (2 * half), 2, half))
        left, right = pairs.unbind(-2)
        found = torch.stack((left + right, left - right), -2).flatten(-3)
        half *= 2
    return found / count**0.5


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _hashed(
    coefficients: Tensor,  # [degree + 1, 1] or [s, degree + 1, 1]
    places: Tensor,  # [n] int64
) -> Tensor:  # [n] or [s, n], from 0 to the prime
    """Polynomials at places, by Horner's rule."""
    value = coefficients[..., 0, :]
    for power in range(1, coefficients.shape[-2]):
        value = (value * places + coefficients[..., power, :]) % _PRIME
    return value


def _signs(coefficients: Tensor, places: Tensor) -> Tensor:
    return 1 - 2 * (_hashed(coefficients, places) % 2)
