"""Bilevel data reweighting by a minimax penalty: one joint field, of first derivatives alone.

Pan et al.: *ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting*, ACL 2025, arXiv 2406.19976.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from optex.checks import check_kind, check_number, check_positive
from optex.draws import generator_states, set_generator_states
from optex.errors import NonFiniteWarning, warn
from optex.sources.interface import GradientSource, scalar_loss
from optex.sources.scalebio.layers import LayerSampler, NumberedBatch
from optex.sources.scalebio.weights import SourceWeights, mixed, slope_of_mixture, source_losses

__all__ = ["MinimaxPenaltySource"]

_OWNER: Final = "MinimaxPenaltySource"


class MinimaxPenaltySource(GradientSource):
    """The joint field of ScaleBiO's minimax problem: weights p of K data sources, and a network twice, w and u.

    The weights that are best for validation solve a bilevel problem: min_p L1(w*(p)), where w*(p) minimises the
    training loss L2(p, ·) = Σ_k q_k l_k(·), q = softmax(p). Its lower level as a penalty of weight α:

        min_{p, w} max_u  Φ = L1(w) + α [L2(p, w) - L2(p, u)]

    An answer is the field (∇_p Φ, s ∇_w Φ, -s ∇_u Φ), along which any torch optimizer descends in p and w and
    ascends in u, all at once:

        p_k:  q_k (D_k - Σ_j q_j D_j),   D_k = α (l_k(w) - l_k(u))
        w:    s (∇L1(w) + α ∇_w L2(p, w))
        u:    s α ∇_u L2(p, u)

    s = 1 / α by default: w's and u's curvature then do not grow with α, and one learning rate serves every α.
    Where w and u have come to rest, p's field is the hypergradient up to O(1 / α). The loss of an answer is Φ.

    **Absent sources.** A batch may lack a source. L2 is then Σ q_k l_k / Σ q_k over the present ones, so that
    the batch's weights sum to one, and the logit of an absent source has gradient 0. Were its loss taken as 0,
    as in the released code, the losses of the others would move it. Batches that have all sources are better: a
    ratio of sums is biased.

    Args:
        validation: ``validation(network, batch)``, L1: a scalar.
        training: ``training(network, batch)``: the mean loss of each source [K]; or samples' losses [n] and the
            numbers of their sources [n], as a pair.
        weights: p.
        model: w, a network.
        rival: u, another one with the same parameters; a copy of ``model`` by default.
        alpha: α, positive. The bias falls as 1 / α; noise in D grows as α, where w and u differ by noise.
        scale: s, positive; None is 1 / α.
        layers: trains few blocks of w and of u at a time; batches are then ``layers.numbered(batches)``.
        deterministic: the losses do not look at the batch.

    Attributes:
        parameters: p, then w's, then u's: what the optimizer is built with, or ``param_groups()``.
        evaluations: 3 gradients, of L1 and L2 at w and of L2 at u.

    Random draws, such as dropout's, are the same at w and at u, so that only the networks differ.

    Raises:
        TypeError, ValueError: an argument cannot work; a batch has no number where ``layers`` asks for it.

    Warns:
        NonFiniteWarning: a loss is NaN or infinite at finite parameters; names which. The answer is then NaN,
            and ``OptEx`` loses that point, or raises if it is the round's start. Once.

    Source: Pan et al., arXiv 2406.19976, with the constants of its released GPT-2 run.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> x, slope = torch.randn(2, 200, 3), torch.tensor([1.0, -2.0, 0.5])
    >>> y = torch.stack([x[0] @ slope, torch.randn(200)])           # the second source is noise
    >>> network = torch.nn.Linear(3, 1, bias=False)
    >>> weights = optex.SourceWeights(["clean", "noise"])
    >>> source = optex.MinimaxPenaltySource(
    ...     lambda network, _: (network(x[0])[:, 0] - y[0]).square().mean(),
    ...     lambda network, _: (network(x)[..., 0] - y).square().mean(1),
    ...     weights, network, deterministic=True,
    ... )
    >>> base = torch.optim.Adam(source.param_groups(lr=0.03, lr_weights=0.1, weight_decay=0.0))
    >>> optimizer = optex.OptEx(base, parallelism=4)
    >>> for _ in optimizer.rounds([None] * 200, source):
    ...     pass
    >>> weights.mass(["clean"]) > 0.95
    True
    """

    def __init__(
        self,
        validation: Callable[[Any, Any], Tensor],
        training: Callable[[Any, Any], Any],
        weights: SourceWeights,
        model: nn.Module,
        rival: nn.Module | None = None,
        *,
        alpha: float = 10.0,
        scale: float | None = None,
        layers: LayerSampler | None = None,
        deterministic: bool = False,
    ) -> None:
        for name, function in (("validation", validation), ("training", training)):
            if not callable(function):
                raise TypeError(
                    f"{_OWNER}: {name} must be a function of (network, batch), got {type(function).__name__}"
                )
        if not isinstance(weights, SourceWeights):
            raise TypeError(f"{_OWNER}: weights must be a SourceWeights, got {type(weights).__name__}")
        self.validation: Callable[[Any, Any], Tensor] = validation
        self.training: Callable[[Any, Any], Any] = training
        self.weights: SourceWeights = weights
        self.model: nn.Module = model
        self.rival: nn.Module = _rival(model, rival)
        self.alpha: float = check_positive(
            _OWNER, "alpha", alpha, "its bias is of the order of 1 / alpha: try 10"
        )
        self.scale: float = (
            1 / self.alpha if scale is None else check_positive(_OWNER, "scale", scale, "or None")
        )
        check_kind(_OWNER, "layers", layers, LayerSampler, "a LayerSampler or None")
        self.layers = layers
        if layers is not None:
            layers.blocks(model)
        self.deterministic = deterministic
        self.evaluations: float = 3.0
        self.module: nn.Module | None = nn.ModuleList([weights, model, self.rival])
        self.parameters: list[nn.Parameter] = [weights.logits, *model.parameters(), *self.rival.parameters()]
        self._said = False

    def param_groups(
        self, lr: float = 1e-5, lr_weights: float = 1e-2, weight_decay: float = 5e-4
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: the logits, without weight decay; and both networks.

        Args:
            lr: of w and u. Under an optimizer that divides by the gradient's size, as Adam, s does not act on
                it: take less where α is larger. (The released runs: 1e-5 at α = 10, 1e-7 at α = 100.)
            lr_weights: of p.
            weight_decay: of w and u.

        Raises:
            ValueError: one is no finite number of at least 0.
        """
        lr = check_number(_OWNER, "lr", lr)
        lr_weights = check_number(_OWNER, "lr_weights", lr_weights)
        weight_decay = check_number(_OWNER, "weight_decay", weight_decay)
        return [
            {"params": [self.weights.logits], "lr": lr_weights, "weight_decay": 0.0},
            {"params": self.parameters[1:], "lr": lr, "weight_decay": weight_decay},
        ]

    def at(self, alpha: float) -> MinimaxPenaltySource:
        """The same source, over the same parameters, with another α and this one's s."""
        other = copy.copy(self)
        other.alpha = check_positive(_OWNER, "alpha", alpha)
        return other

    # ------------------------------------------------------------------ answers

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        number, batch = self._read(batch)
        q = self.weights().detach()
        own = [self._trained(network, number, copy) for copy, network in enumerate((self.model, self.rival))]
        upper, pulled = self._upper(batch, own[0])
        draws = generator_states()
        at_w, present, pushed = self._lower(self.model, q, batch, own[0])
        set_generator_states(draws)
        at_u, also, raised = self._lower(self.rival, q, batch, own[1])
        if not torch.equal(present, also):
            raise ValueError(
                f"{_OWNER}: training answered other sources at u than at w for one batch; which sources "
                "a batch has must not be drawn at random, nor depend on the network"
            )
        excess = self.alpha * (at_w - at_u)  # D [K]
        loss = upper + mixed(q, excess.to(q), present)
        self._check_values(loss, upper, at_w, at_u)
        self.weights.logits.grad = slope_of_mixture(q, excess.to(q), present)
        s, alpha = self.scale, self.alpha
        along = [p + alpha * g for p, g in zip(pulled, pushed, strict=True)]
        self._leave(self.model, own[0], [s * g for g in along])
        self._leave(self.rival, own[1], [s * alpha * g for g in raised])
        return loss, None

    def _read(self, batch: Any) -> tuple[int | None, Any]:
        if self.layers is None:
            return None, batch.batch if isinstance(batch, NumberedBatch) else batch
        if not isinstance(batch, NumberedBatch):
            raise TypeError(
                f"{_OWNER}: with layers every batch has a number, which says what is trained; hand "
                f"layers.numbered(batches) over in place of the batches, got {type(batch).__name__}"
            )
        return batch

    def _trained(self, network: nn.Module, number: int | None, copy: int) -> list[Tensor]:
        parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        if self.layers is None or number is None:
            return parameters
        frozen = {id(p) for p in self.layers.frozen_parameters(network, number, copy)}
        return [p for p in parameters if id(p) not in frozen]

    def _upper(self, batch: Any, own: list[Tensor]) -> tuple[Tensor, list[Tensor]]:  # [], as own
        """L1 at w, and its gradient."""
        loss = scalar_loss(self.validation(self.model, batch), f"{_OWNER}: validation")
        return loss.detach(), _differentiated(loss, own, "validation")

    def _lower(
        self,
        network: nn.Module,
        q: Tensor,  # [K]
        batch: Any,
        own: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # [K], [K] bool, as own
        """The sources' losses at a network, which are present, and the gradient of L2."""
        losses, present = source_losses(_OWNER, self.training(network, batch), len(q))
        total = mixed(q.to(losses), losses, present)
        return losses.detach(), present, _differentiated(total, own, "training")

    def _leave(self, network: nn.Module, own: list[Tensor], gradients: list[Tensor]) -> None:
        found = {id(p): g for p, g in zip(own, gradients, strict=True)}
        absent = self.layers is not None and self.layers.frozen == "none"
        for p in network.parameters():
            gradient = found.get(id(p))
            p.grad = torch.zeros_like(p) if gradient is None and p.requires_grad and not absent else gradient

    def _check_values(self, loss: Tensor, upper: Tensor, at_w: Tensor, at_u: Tensor) -> None:
        if self._said or bool(loss.isfinite()) or not all(bool(p.isfinite().all()) for p in self.parameters):
            return
        self._said = True
        culprits = [] if bool(upper.isfinite()) else [f"validation is {float(upper):g} at w"]
        for place, losses in (("w", at_w), ("u", at_u)):
            for name, value in zip(self.weights.names, losses.tolist(), strict=True):
                if value - value != 0:  # NaN or infinite
                    culprits.append(f"training is {value:g} for source {name!r} at {place}")
        text = "; ".join(culprits) or "the penalty is not finite"
        warn(
            f"{_OWNER}: at finite parameters {text}. This point counts as lost. Lower the rates, or look at "
            "that data. The mean of no samples is NaN, too: return samples' losses with their sources, and an "
            "empty source counts as absent.",
            NonFiniteWarning,
        )


def _rival(model: Any, rival: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OWNER}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{_OWNER}: model has no parameter that is trained")
    if rival is None:
        return copy.deepcopy(model)
    if not isinstance(rival, nn.Module):
        raise TypeError(f"{_OWNER}: rival must be a torch.nn.Module or None, got {type(rival).__name__}")
    shapes = [[(name, p.shape) for name, p in network.named_parameters()] for network in (model, rival)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{_OWNER}: rival must have the parameters of model, name for name; take a deepcopy of it"
        )
    if {id(p) for p in model.parameters()} & {id(p) for p in rival.parameters()}:
        raise ValueError(f"{_OWNER}: rival shares parameters with model; take a deepcopy of it")
    return rival


def _differentiated(loss: Tensor, own: list[Tensor], name: str) -> list[Tensor]:
    if not loss.requires_grad:
        raise ValueError(
            f"{_OWNER}: {name} does not depend on the network through autograd; compute it from the network "
            "that it is handed, without .item(), .detach() or torch.no_grad()"
        )
    found = torch.autograd.grad(loss, own, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
