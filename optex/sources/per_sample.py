"""Gradients of all samples of a batch at once, so that the noise of their mean is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from optex.batching import GradientMoments, GradientStatistics
from optex.checks import check_callable, check_integer
from optex.functional import called_with
from optex.sources.interface import GradientSource
from optex.sources.objective import LossModule

__all__ = ["PerSampleSource"]


class PerSampleSource(GradientSource):
    """The gradient of ``objective(batch)`` as a mean over its samples, and its noise from their spread.

    The objective is one for ``ObjectiveSource``, the mean over the samples of a batch: it is differentiated for
    every sample by itself, as a batch of one, in one ``torch.func.vmap``. Tensors of the batch are cut along
    their first dimension; other entries, and tensors without dimensions, are the same for all samples. Dropout
    draws anew for every sample.

    Args:
        objective: the scalar loss of a batch, which reads the parameters through ``model``. Samples must not
            depend on each other.
        model: whose parameters that require a gradient are optimised.
        chunk_size: samples in one ``vmap``, which holds that many gradients; None takes all at once.

    Raises:
        TypeError, ValueError: ``objective`` cannot be called, ``model`` is no module, or ``chunk_size`` no
            positive integer; at evaluation: BatchNorm in training mode, which mixes samples; a batch whose
            tensors are not of one length.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(2, 1)
    >>> source = optex.PerSampleSource(lambda x: (model(x) - 1).square().mean(), model)
    >>> loss, statistics = source.measure(torch.randn(16, 2))     # and leaves the gradient in .grad
    >>> loss, variance = source.gradient(torch.randn(16, 2))      # the same for optex.OptEx.rounds
    >>> optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> reports = list(optimizer.rounds([torch.randn(16, 2) for _ in range(8)], source))
    >>> all(report.noise_variance > 0 for report in reports)
    True
    """

    def __init__(
        self, objective: Callable[[Any], Tensor], model: nn.Module, *, chunk_size: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"PerSampleSource: model must be a torch.nn.Module, got {type(model).__name__}")
        if chunk_size is not None:
            check_integer("PerSampleSource", "chunk_size", chunk_size)
        check_callable("PerSampleSource", "objective", objective)
        self.objective: Callable[[Any], Tensor] = objective
        self.module: nn.Module | None = model
        self.chunk_size: int | None = chunk_size
        self._loss = LossModule(model, objective)
        self._reached: tuple[tuple[str, ...], list[bool]] = ((), [])

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        loss, moments, _ = self._evaluate(batch, products=False)
        statistics = moments.statistics()
        if math.isnan(statistics.variance):
            return loss, None
        dimension = sum(mean.numel() for mean in moments.mean)
        return loss, torch.tensor(statistics.noise_variance(dimension), dtype=torch.float64)

    def measure(self, batch: Any) -> tuple[Tensor, GradientStatistics]:  # []
        """Loss and statistics of a batch's gradient, which is left in the parameters' ``.grad``.

        With several chunks the gradients are computed twice, since products with their mean need it first.
        """
        loss, moments, products = self._evaluate(batch, products=True)
        return loss, moments.statistics(inner_products=products)

    def _evaluate(self, batch: Any, *, products: bool) -> tuple[Tensor, GradientMoments, Tensor | None]:
        samples = _Samples(self._loss, batch)
        chunks = samples.chunks(self.chunk_size)
        moments, losses, gradients = GradientMoments(), [], []
        again = products and len(chunks) > 1
        with torch.no_grad():
            with samples.pinned() if again else nullcontext():  # or dropout would draw others the second time
                for chunk in chunks:
                    gradients, loss = samples.gradients(chunk)
                    moments.add(gradients)
                    losses.append(loss)
            found = None
            if again:
                parts = [moments.inner_products(samples.gradients(chunk)[0]) for chunk in chunks]
                found = torch.cat(parts)
            elif products:
                found = moments.inner_products(gradients)
        for p, mean, reached in zip(samples.parameters, moments.mean, self._mask(samples), strict=True):
            p.grad = mean.to(p) if reached else None
        return torch.cat(losses).mean(), moments, found

    def _mask(self, samples: _Samples) -> list[bool]:
        # vmap answers zeros where the loss does not reach, and an optimizer must see None there.
        known, mask = self._reached
        if known != samples.names:
            mask = samples.reached()
            self._reached = (samples.names, mask)
        return mask


class _Samples:
    """A batch, cut into its samples.

    Attributes:
        names, parameters: those to differentiate with respect to.
    """

    def __init__(self, loss: LossModule, batch: Any) -> None:
        if any(isinstance(part, _BatchNorm) and part.training for part in loss.modules()):
            raise ValueError(
                "PerSampleSource: the model has BatchNorm in training mode, where no sample has a gradient of "
                "its own; put it in eval(), use another normalisation, or take optex.AccumulatingSource"
            )
        self._loss = loss
        named = {name: p for name, p in loss.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("PerSampleSource: no parameter of the model requires a gradient")
        self.names, self.parameters = tuple(named), list(named.values())
        self._leaves, self._structure = pytree.tree_flatten(batch)
        self._cut = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in self._leaves]
        lengths = {len(leaf) for leaf, cut in zip(self._leaves, self._cut, strict=True) if cut}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                "PerSampleSource: a batch has tensors whose first dimension is its samples; got lengths "
                f"{sorted(lengths)}"
            )
        (self.count,) = lengths

    def chunks(self, size: int | None) -> list[slice]:
        """The samples in groups of this size at most."""
        step = self.count if size is None else size
        return [slice(start, start + step) for start in range(0, self.count, step)]

    def gradients(self, chunk: slice) -> tuple[list[Tensor], Tensor]:  # a parameter each [n, ...], [n]
        """Gradient and loss of each of these samples."""
        one = vmap(
            grad_and_value(self._loss_of),
            in_dims=(None, *(0 if cut else None for cut in self._cut)),
            randomness="different",
        )
        values = {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}
        gradients, losses = one(values, *self._rows(chunk))
        return [gradients[name] for name in self.names], losses

    def _rows(self, chunk: slice) -> list[Any]:
        return [leaf[chunk] if cut else leaf for leaf, cut in zip(self._leaves, self._cut, strict=True)]

    def _loss_of(self, values: dict[str, Tensor], *sample: Any) -> Tensor:  # []
        batch = [leaf[None] if cut else leaf for leaf, cut in zip(sample, self._cut, strict=True)]
        return called_with(self._loss, values, pytree.tree_unflatten(batch, self._structure))

    def reached(self) -> list[bool]:
        """Which parameters the loss depends on, found by one plain backward pass over the first sample."""
        with self.pinned(), torch.enable_grad():
            loss = self._loss(pytree.tree_unflatten(self._rows(slice(1)), self._structure))
            if not loss.requires_grad:
                raise ValueError(
                    "PerSampleSource: the loss does not depend on any parameter of model through autograd; "
                    "compute it from that model's output, without .item(), .detach() or torch.no_grad()"
                )
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [gradient is not None for gradient in found]

    def pinned(self) -> AbstractContextManager[None]:
        """A context that puts torch's random generators back at its end."""
        devices = {p.device for p in self.parameters if p.device.type == "cuda"}
        return torch.random.fork_rng(devices=list(devices))
