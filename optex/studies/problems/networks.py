"""Networks that classify images, for any image size, width and depth, and how they are initialised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CLASSIFIERS", "Classifier", "evaluation_mode", "initialise"]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A context with dropout off and BatchNorm on its running statistics; modules are as before after it."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise a network as torch does, but from a given generator, and reset its buffers.

    Weights and biases of linear and convolutional layers are uniform in ±1/√fan-in, embeddings are N(0, 1).
    Normalisation layers start without scale, shift and statistics.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            for parameter in layer.parameters():
                # Drawn on the CPU in single precision, so that the start is the same on every device.
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif isinstance(layer, nn.Embedding):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            layer.reset_parameters()


@dataclass(frozen=True)
class Classifier:
    """A kind of network: images [n, channels, side, side] in, scores [n, 10] out.

    Attributes:
        build: makes one from channels, side, width and depth.
        width: the default.
        depth: the default.
        held_size: how many images its loss is evaluated on in well under a third of a second on one core.
    """

    build: Callable[[int, int, int, int], nn.Module]
    width: int
    depth: int
    held_size: int


def _mlp(channels: int, side: int, width: int, depth: int) -> nn.Module:
    """``depth`` hidden layers of ``width`` units, ReLU."""
    sizes = [channels * side**2] + [width] * depth
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def _cnn(channels: int, side: int, width: int, depth: int) -> nn.Module:
    """``depth`` times 3 × 3 convolution, ReLU, 2 × 2 max pooling; ``width`` channels, doubled each time."""
    if side >> depth == 0:
        raise ValueError(
            f"cnn: depth must be at most {side.bit_length() - 1} for images of side {side}, got {depth}"
        )
    sizes = [channels] + [width << i for i in range(depth)]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * (side >> depth) ** 2, 10))


class _Residual(nn.Module):
    """h + f(h)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.branch(hidden)


def _residual_mlp(channels: int, side: int, width: int, depth: int) -> nn.Module:
    """``depth`` blocks h + W2 relu(W1 norm(h)) of ``width`` units between two linear layers."""
    blocks = [
        _Residual(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for _ in range(depth)
    ]
    first, last = nn.Linear(channels * side**2, width), nn.Linear(width, 10)
    return nn.Sequential(nn.Flatten(), first, *blocks, nn.LayerNorm(width), last)


class _ResNetBlock(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm, and a shortcut without parameters (the paper's option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.stride, self.missing = stride, after - before

    def forward(self, hidden: Tensor) -> Tensor:  # [n, before, s, s] -> [n, after, s/stride, s/stride]
        branch = functional.relu(self.first_norm(self.first(hidden)))
        branch = self.second_norm(self.second(branch))
        shortcut = hidden[:, :, :: self.stride, :: self.stride]
        half = self.missing // 2  # zeros in place of the new channels, half before the old ones and half after
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, half, self.missing - half))
        return functional.relu(branch + shortcut)


def _resnet(channels: int, side: int, width: int, depth: int) -> nn.Module:  # noqa: ARG001 (any side will do)
    """He, Zhang, Ren, Sun: *Deep Residual Learning*, CVPR 2016, section 4.2: 6n + 2 layers, three sizes."""
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        raise ValueError(f"resnet: depth must be 8, 14, 20, ... (6n + 2 layers), got {depth}")
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage in range(3):
        for i in range(blocks):
            after = width << stage
            layers.append(_ResNetBlock(before, after, stride=2 if stage and i == 0 else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


CLASSIFIERS: Final[dict[str, Classifier]] = {
    "mlp": Classifier(_mlp, width=128, depth=1, held_size=2000),
    "cnn": Classifier(_cnn, width=16, depth=2, held_size=500),
    "residual-mlp": Classifier(_residual_mlp, width=128, depth=3, held_size=2000),
    "resnet": Classifier(_resnet, width=16, depth=20, held_size=250),
}
