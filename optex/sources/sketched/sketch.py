"""``Sketch``: what both ends of a channel have to agree on, and the two maps between d numbers and s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from optex.checks import check_integer, shown
from optex.sources.sketched.matrices import MATRICES, RandomMatrix

__all__ = ["Sketch"]


@final
@dataclass(frozen=True)
class Sketch:
    """Random matrices R_t [s, d], t = 0, 1, 2, …, with E[R_tᵀR_t] = I: ``sk`` is R_t g, ``desk`` is R_tᵀ y.

    R_t is a function of (kind, s, seed, t, d). Whoever knows these draws the same matrix, whatever the device
    and the precision; it is never sent, and never written down as a whole. ``desk(sk(g))`` is g in the mean,
    and

        E‖RᵀR g‖² = (1 + ω) ‖g‖²

    ==========  ======================================================  ====================  =============
    kind        R                                                       1 + ω                 work
    ==========  ======================================================  ====================  =============
    gaussian    independent N(0, 1/s)                                   1 + (d + 1)/s         s d
    srht        √(D/s) · s rows of Hadamard's matrix · random signs     d/s if d is D         d log d
    count       one sign a column, in a row that is hashed              1 + (d - 1)/s         d
    ams         ±1/√s, a 4-wise independent hash function a row         1 + (d - 1)/s         s d
    ==========  ======================================================  ====================  =============

    D is the least power of 2 that is not below d; ``second_moment`` has 1 + ω for any d. Gradient descent on
    RᵀR g takes steps 1 + ω times shorter than on g, and as many times more of them.

    Args:
        kind: as above.
        size: s, at least 1; at most d, when d is known.
        seed: shared by both ends, not negative. It is no secret: a sketch hides nothing.

    Raises:
        ValueError: the kind is unknown, a number is out of range, or vectors are shorter than s.
        TypeError: vectors are no floating-point tensors.

    >>> import torch, optex
    >>> sketch = optex.Sketch("srht", 16, seed=1)
    >>> g = torch.arange(64.0)
    >>> message = sketch.sk(g, 7)                                  # round 7
    >>> message.shape, sketch.desk(message, 64, 7).shape, sketch.second_moment(64)
    (torch.Size([16]), torch.Size([64]), 4.0)
    >>> mean = sum(sketch.desk(sketch.sk(g, t), 64, t) for t in range(2000)) / 2000
    >>> bool((mean - g).norm() < 0.06 * g.norm())
    True

    Source: Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371 (sk and desk); the moments are derived in
    ``matrices.py``.
    """

    kind: Literal["gaussian", "srht", "count", "ams"]
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in MATRICES:
            raise ValueError(f"Sketch: kind must be one of {', '.join(MATRICES)}, got {shown(self.kind)}")
        check_integer("Sketch", "size", self.size)
        check_integer("Sketch", "seed", self.seed, least=0)

    def sk(
        self,
        vectors: Tensor,  # [..., d]
        number: int = 0,
    ) -> Tensor:  # [..., s]
        """R_t g of one vector or of several.

        Args:
            vectors: of any floating dtype, which the answer has, too; computed in float32 at least.
            number: t.
        """
        _check_tensor(vectors, "sk")
        matrix = self._matrix(vectors.shape[-1], number)
        return matrix.forward(_wide(vectors)).to(vectors.dtype)

    def desk(
        self,
        sketched: Tensor,  # [..., s]
        dimension: int,
        number: int = 0,
    ) -> Tensor:  # [..., d]
        """R_tᵀ y.

        Args:
            sketched: messages, or their mean: both maps are linear.
            dimension: d.
            number: t.
        """
        _check_tensor(sketched, "desk")
        if sketched.shape[-1] != self.size:
            raise ValueError(f"Sketch: desk takes rows of {self.size} numbers, got {sketched.shape[-1]}")
        return self._matrix(dimension, number).adjoint(_wide(sketched)).to(sketched.dtype)

    def second_moment(self, dimension: int) -> float:
        """1 + ω = E‖RᵀR g‖² / ‖g‖² of vectors of d numbers."""
        return MATRICES[self.kind].second_moment(self.size, self._checked(dimension))

    def _matrix(self, dimension: int, number: int) -> RandomMatrix:
        number = check_integer("Sketch", "number", number, least=0)
        return MATRICES[self.kind](self.size, self._checked(dimension), (self.seed, number))

    def _checked(self, dimension: int) -> int:
        dimension = check_integer("Sketch", "dimension", dimension)
        if dimension < self.size:
            raise ValueError(
                f"Sketch: size is {self.size} and vectors have {dimension} numbers; lower it, or send them as "
                "they are"
            )
        return dimension


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check_tensor(values: object, name: str) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point() or not values.ndim:
        came = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"Sketch: {name} takes floating-point tensors [..., n], got {came}")
