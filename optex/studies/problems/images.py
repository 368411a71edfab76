"""Classifying images: Fashion-MNIST and CIFAR-10, with networks from a small MLP to ResNets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer
from optex.studies.problems.data import Split, cifar10, fashion_mnist
from optex.studies.problems.interface import Problem, seeded_generator
from optex.studies.problems.networks import CLASSIFIERS, evaluation_mode, initialise

__all__ = ["CIFAR10", "FashionMNIST", "ImageClassification"]

_CHUNK = 500  # images evaluated at a time
_PADDING = 4


class ImageClassification(Problem):
    """A network that classifies images into ten classes, cross entropy.

    Pixels are scaled to mean 0 and deviation 1 over the training set, channel by channel. Each epoch is a new
    seeded permutation of the training images, cut into batches of one size; the few left over are not used in
    that epoch. The objective without noise is the loss on the held batches, in evaluation mode: ``held_size``
    of the training images, the same ones for every seed.

    The process caches the data, and the problem does not hold it: it is cheap to copy and to send.

    Args:
        seed: of the start (uniform in ±1/√fan-in, as for ``torch.nn.Linear``), the permutations and the
            augmentation.
        model: ``"mlp"``, ``"cnn"``, ``"residual-mlp"`` or ``"resnet"``; None is the data set's default. width:
        of the model: units of a hidden layer, or channels of the first convolutions; None is its default.
        depth: of the model: hidden layers of the MLP, convolutions of the CNN, blocks of the residual MLP, or
            layers of the ResNet, 6n + 2; None is its default.
        batch_size: images a batch.
        train_size: training images to use, the same ones for every seed; None is all.
        held_size: training images of the held batches; None is as many as the model evaluates in less than 0.3
            seconds on one core.
        test_size: test images for ``test_error``, the first ones; None is all.
        augment: whether to shift training images by up to 4 pixels, filling with black, and to mirror each with
            probability ½. The draws belong to the batch: all methods see the same images.

    Raises:
        FileNotFoundError: the data is not on this machine; the message says how to get it.
        ModuleNotFoundError: a package to read it is not installed.
        ValueError: an argument is out of range.
    """

    default_model: ClassVar[str]
    mean: ClassVar[tuple[float, ...]]
    deviation: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        seed: int = 0,
        model: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        batch_size: int = 64,
        train_size: int | None = None,
        held_size: int | None = None,
        test_size: int | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__(seed)
        images, _ = self._arrays("train")
        self.model: str = self.default_model if model is None else model
        if self.model not in CLASSIFIERS:
            raise ValueError(f"{type(self).__name__}: model {model!r} is not one of {', '.join(CLASSIFIERS)}")
        kind = CLASSIFIERS[self.model]
        self.train_size: int = len(images) if train_size is None else train_size
        self._check("train_size", self.train_size, len(images))
        self.held_size: int = min(kind.held_size, self.train_size) if held_size is None else held_size
        self._check("held_size", self.held_size, self.train_size)
        if test_size is not None:
            self._check("test_size", test_size, len(self._arrays("test")[1]))
        self.test_size: int | None = test_size
        self.batch_size: int = batch_size
        self._check("batch_size", self.batch_size, self.train_size)
        self.augment: bool = augment
        # One order for every seed: the training images come first in it, and of these the held batches.
        self._order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))[: self.train_size]
        width, depth = kind.width if width is None else width, kind.depth if depth is None else depth
        self._check("width", width, 1 << 16)
        self._check("depth", depth, 1 << 10)
        with torch.random.fork_rng(devices=[]):  # layers draw an initialisation that is replaced below
            self.network: nn.Module = kind.build(images.shape[1], images.shape[2], width, depth)
        self.reset()

    def _check(self, name: str, value: int, most: int) -> None:
        check_integer(type(self).__name__, name, value, most=most)

    @abstractmethod
    def _arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:  # [n, c, h, w], [n]
        """Images and labels of the data set."""

    def _tensors(self, split: Split) -> tuple[Tensor, Tensor]:  # [n, c, h, w] and [n], uint8
        images, labels = self._arrays(split)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _prepared(
        self,
        images: Tensor,  # [n, c, h, w], uint8
        labels: Tensor,  # [n], uint8
    ) -> tuple[Tensor, Tensor]:  # as forward takes them
        like = next(self.parameters())
        mean, deviation = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        return (images.to(like.device, like.dtype) / 255 - mean) / deviation, labels.to(like.device).long()

    def logits(
        self,
        images: Tensor,  # [n, c, h, w], scaled
    ) -> Tensor:  # [n, 10]
        """The network's scores."""
        return self.network(images)

    def forward(
        self,
        batch: tuple[Tensor, Tensor],  # [n, c, h, w] scaled, [n]
    ) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.logits(images), labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = seeded_generator(self.seed, "batches")
        images, labels = self._tensors("train")
        whole = self.train_size - self.train_size % self.batch_size
        while True:
            shuffled = torch.randperm(self.train_size, generator=generator)[:whole]
            for places in shuffled.split(self.batch_size):
                rows = self._order[places]
                pixels = images[rows]
                if self.augment:
                    pixels = shifted_and_mirrored(pixels, generator)
                yield self._prepared(pixels, labels[rows])

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on the held batches."""
        images, labels = self._tensors("train")
        total = 0.0
        with evaluation_mode(self):
            for rows in self._order[: self.held_size].split(_CHUNK):
                total += float(self(self._prepared(images[rows], labels[rows]))) * len(rows)
        return total / self.held_size

    @torch.no_grad()
    def test_error(self) -> float:
        """Share of the test images that the network gets wrong."""
        wrong = count = 0
        chunks = zip(*(values[: self.test_size].split(_CHUNK) for values in self._tensors("test")), strict=True)
        with evaluation_mode(self):
            for chunk in chunks:
                images, labels = self._prepared(*chunk)
                wrong += int((self.logits(images).argmax(1) != labels).sum())
                count += len(labels)
        return wrong / count

    def reset(self) -> None:
        initialise(self.network, seeded_generator(self.seed, "start"))


def shifted_and_mirrored(
    images: Tensor,  # [n, c, h, w], uint8
    generator: torch.Generator,
) -> Tensor:  # [n, c, h, w], uint8
    """A random crop of each image after padding with 4 black pixels, mirrored with probability ½."""
    count, channels, height, width = images.shape
    tops, lefts = torch.randint(2 * _PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    rows = tops + torch.arange(height)  # [n, h]
    columns = lefts + torch.arange(width)  # [n, w]
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (_PADDING,) * 4)
    each, plane = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[each, plane, rows[:, None, :, None], columns[:, None, None, :]]


@final
class FashionMNIST(ImageClassification):
    """Ten classes of clothes, 28 × 28 grey pixels; 60,000 images to train on, 10,000 held out.

    By default a 784-128-10 ReLU network, d = 101,770; ``model="cnn"`` has d = 20,490. Data: Xiao, Rasul,
    Vollgraf, *Fashion-MNIST*, arXiv 1708.07747. Arguments are those of :class:`ImageClassification`.
    """

    name = "fashion-mnist"
    default_model = "mlp"
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    deviation: ClassVar[tuple[float, ...]] = (0.3530,)

    def _arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return fashion_mnist(split)


@final
class CIFAR10(ImageClassification):
    """Ten classes of objects and animals, 32 × 32 coloured pixels; 50,000 images to train on, 10,000 held out.

    By default a residual MLP, which OptEx's paper trains on these images, too (section 6.3); its sizes are
    ours: 3 blocks of width 128, d = 494,730. ``model="resnet"`` is ResNet-20, with BatchNorm and d = 269,722.
    Data: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009. Arguments are those of
    :class:`ImageClassification`.
    """

    name = "cifar10"
    default_model = "residual-mlp"
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    deviation: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)

    def _arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return cifar10(split)
