"""Predicting text, character by character: a decoder-only transformer on Shakespeare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer, shown
from optex.studies.problems.data import shakespeare
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.networks import evaluation_mode, initialise

__all__ = ["Shakespeare", "Transformer"]

_HELD_OUT: Final = 10  # one part in so many of the text, at its end, is held out
_CHUNK: Final = 32  # windows evaluated at a time


@lru_cache(maxsize=2)
def _encoded(text: str) -> tuple[Tensor, int]:  # [characters], places in the sorted alphabet; its size
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    alphabet, codes = np.unique(points, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), len(alphabet)


class Transformer(nn.Module):
    """A small GPT-2: scores of each next character from the characters before it.

    Args:
        alphabet: how many different characters there are.
        layers, heads, width, context, dropout: as in :class:`Shakespeare`.
    """

    def __init__(
        self, alphabet: int, layers: int, heads: int, width: int, context: int, dropout: float
    ) -> None:
        super().__init__()
        self.characters: nn.Embedding = nn.Embedding(alphabet, width)
        self.positions: nn.Embedding = nn.Embedding(context, width)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.blocks: nn.Sequential = nn.Sequential(*(_Block(heads, width, dropout) for _ in range(layers)))
        self.norm: nn.LayerNorm = nn.LayerNorm(width)
        self.output: nn.Linear = nn.Linear(width, alphabet)

    def forward(
        self,
        codes: Tensor,  # [n, t], int64; t at most the context
    ) -> Tensor:  # [n, t, alphabet]
        hidden = self.characters(codes) + self.positions.weight[: codes.shape[-1]]
        return self.output(self.norm(self.blocks(self.dropout(hidden))))

    @torch.no_grad()
    def initialise_as_gpt_2(self, generator: torch.Generator) -> None:
        """Weights N(0, 0.02²), at the end of each branch with 0.02 / √(2 · layers) instead; biases 0."""
        last = tuple(layer for block in self.blocks for layer in (block.projection, block.narrow))
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                deviation = 0.02 / math.sqrt(len(last)) if layer in last else 0.02
                layer.weight.copy_(deviation * torch.randn(layer.weight.shape, generator=generator))
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
            if isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()


class _Block(nn.Module):
    """Causal self-attention, then a two-layer network at each character, each with a residual connection."""

    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:  # [n, t, width] -> [n, t, width]
        hidden = hidden + self.dropout(self.projection(self._attend(self.attention_norm(hidden))))
        wide = functional.gelu(self.wide(self.norm(hidden)))
        return hidden + self.dropout(self.narrow(wide))

    def _attend(self, hidden: Tensor) -> Tensor:  # [n, t, width] -> [n, t, width]
        count, length, width = hidden.shape
        parts = self.attention(hidden).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [n, heads, t, width / heads]
        # Written out, as torch's fused attention has no rule for vmap, and warns.
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        mixed = self.dropout(scores.masked_fill(later, -math.inf).softmax(-1)) @ value
        return mixed.transpose(1, 2).reshape(count, length, width)


@final
class Shakespeare(Problem):
    """A transformer that predicts the next character of Shakespeare's plays, cross entropy in nats a character.

    The first nine tenths of tinyshakespeare (1,115,394 characters, 65 different ones) are trained on, the last
    tenth is held out. Each epoch cuts the text, from a random character on, into windows of ``context``
    characters and shuffles them, both seeded; windows that do not fill a batch are not used in that epoch. The
    objective without noise is the loss on the held batches, in evaluation mode: ``held_size`` windows spread
    evenly over the training text, the same ones for every seed.

    Args:
        seed: of the start and of the batches.
        layers: blocks. The defaults make d = 112,577; ``layers=6, heads=6, width=384, context=256, dropout=0.2,
            batch_size=64`` is nanoGPT's network for this text, d = 10.8 million.
        heads: of attention; they divide the width.
        width: numbers for each character.
        context: characters in a window.
        dropout: probability that an activation is set to zero in a step, in [0, 1).
        batch_size: windows a batch.
        held_size: windows of the held batches; None is 128, or as many as there are.
        test_size: windows of the held-out text for ``test_error``, the first ones; None is all.
        start: ``"torch"`` for the initialisation of torch's layers, or ``"gpt2"`` for GPT-2's, which is much
            smaller, N(0, 0.02²).

    Raises:
        FileNotFoundError: the text is not on this machine; the message says how to get it.
        ValueError: an argument is out of range.
    """

    name = "shakespeare"

    def __init__(
        self,
        seed: int = 0,
        layers: int = 2,
        heads: int = 4,
        width: int = 64,
        context: int = 64,
        dropout: float = 0.0,
        batch_size: int = 16,
        held_size: int | None = None,
        test_size: int | None = None,
        start: str = "torch",
    ) -> None:
        super().__init__(seed)
        training, testing, alphabet = self._text()
        self._check("layers", layers, 1 << 10)
        self._check("context", context, len(training) // 2)
        windows = (len(training) - context) // context  # in the epoch that begins latest
        self._check("batch_size", batch_size, windows)
        held_size = min(128, windows) if held_size is None else held_size
        self._check("held_size", held_size, windows)
        if test_size is not None:
            self._check("test_size", test_size, (len(testing) - 1) // context)
        self.test_size: int | None = test_size
        self._check("width", width, 1 << 16)
        self._check("heads", heads, width)
        if width % heads:
            raise ValueError(f"Shakespeare: heads must divide the width of {width}, got {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"Shakespeare: dropout must be at least 0 and below 1, got {dropout}")
        if start not in ("torch", "gpt2"):
            raise ValueError(f"Shakespeare: start must be 'torch' or 'gpt2', got {shown(start)}")
        self.start: str = start
        self.context: int = context
        self.batch_size: int = batch_size
        self.held_size: int = held_size
        with torch.random.fork_rng(devices=[]):  # layers draw an initialisation that is replaced below
            self.network: Transformer = Transformer(alphabet, layers, heads, width, context, dropout)
        self.reset()

    def _check(self, name: str, value: int, most: int) -> None:
        check_integer("Shakespeare", name, value, most=most)

    @staticmethod
    def _text() -> tuple[Tensor, Tensor, int]:  # codes to train on, codes held out, size of the alphabet
        codes, alphabet = _encoded(shakespeare())
        held_out = len(codes) // _HELD_OUT
        return codes[:-held_out], codes[-held_out:], alphabet

    def _windows(
        self,
        codes: Tensor,  # [characters]
        starts: Tensor,  # [n]
    ) -> tuple[Tensor, Tensor]:  # [n, context] and what follows each of its characters, [n, context]
        device = next(self.parameters()).device
        windows = codes[starts[:, None] + torch.arange(self.context + 1)].to(device)
        return windows[:, :-1], windows[:, 1:]

    def forward(
        self,
        batch: tuple[Tensor, Tensor],  # [n, context], [n, context]
    ) -> Tensor:
        codes, following = batch
        return functional.cross_entropy(self.network(codes).flatten(0, 1), following.flatten())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = seeded_generator(self.seed, "batches")
        codes, _, _ = self._text()
        while True:
            shift = int(torch.randint(self.context, (), generator=generator))
            windows = (len(codes) - 1 - shift) // self.context
            order = torch.randperm(windows, generator=generator)[: windows - windows % self.batch_size]
            for places in order.split(self.batch_size):
                yield self._windows(codes, shift + self.context * places)

    def evaluate(self) -> float:
        """The loss on the held batches."""
        codes, _, _ = self._text()
        last = len(codes) - 1 - self.context
        return self._mean_loss(codes, torch.linspace(0, last, self.held_size, dtype=torch.float64).long())

    def test_error(self) -> float:
        """The loss on the held-out text, cut into windows from its beginning."""
        _, codes, _ = self._text()
        starts = torch.arange(0, len(codes) - self.context, self.context)
        return self._mean_loss(codes, starts[: self.test_size])

    @torch.no_grad()
    def _mean_loss(
        self,
        codes: Tensor,  # [characters]
        starts: Tensor,  # [n]
    ) -> float:
        with evaluation_mode(self):
            parts = starts.split(_CHUNK)
            total = sum(float(self(self._windows(codes, part))) * len(part) for part in parts)
        return total / len(starts)

    def reset(self) -> None:
        generator = seeded_generator(self.seed, "start")
        if self.start == "gpt2":
            self.network.initialise_as_gpt_2(generator)
        else:
            initialise(self.network, generator)
