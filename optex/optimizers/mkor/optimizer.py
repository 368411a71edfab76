"""The optimizer: a gradient transform around any torch optimizer of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from optex.checks import (
    check_flag,
    check_integer,
    check_number,
    saved_entry,
    saved_integer,
    saved_tensor,
    shown,
)
from optex.errors import NonFiniteWarning, warn
from optex.optimizers.mkor.capture import Capture, Vectors, layers_of
from optex.optimizers.mkor.factors import UPDATES, preconditioned, stabilised
from optex.optimizers.mkor.switch import judged, noted, watch
from optex.optimizers.step_rule import checked_gradients
from optex.wrapper import OptimizerWrapper

__all__ = ["MKOR"]

_STATE_KEY = "mkor"


class MKOR(OptimizerWrapper):
    """A first-order step with every layer's gradient between two inverse factors, ``U = P_L [g_W | g_b] P_R``.

    Every ``interval`` steps the factors take in one vector each, at a cost of d² and not d³: the right one the
    mean a of the layer's inputs (and a 1 for the bias), the left one the mean g over samples of the gradient of
    a sample's loss by the layer's output::

        released:  Q = decay P + (1 - decay) I,   P <- Q - Q v (Q v)' / (1 + v' Q v)
        exact:     P <- [P - (1 - decay) P v (P v)' / (decay + (1 - decay) v' P v)] / decay

    A factor whose largest entry is above ``threshold`` is pulled to the identity. U is scaled to the length of
    the gradient; the base optimizer steps with it, and afterwards the parameters' ``.grad`` are the gradients
    again. Linear layers and convolutions (``Conv2d``, one group) have factors; all other parameters, and layers
    that share theirs, are stepped by the base optimizer alone.

    Hooks record the vectors in evaluations with autograd on, in training and evaluation mode alike; run what
    is not for training under ``torch.no_grad()``. Several backward passes before a step count as one batch.
    Losses have to be means over the batch. ``with MKOR(...) as optimizer`` removes the hooks at its end.

    Args:
        model: the module whose layers get factors.
        base_optimizer: any ``torch.optim.Optimizer`` of its parameters that steps with ``.grad``; its groups
            and state are shared live.
        variant: ``"released"``, as in the authors' code, or ``"exact"``, the inverse of a running mean of v v'.
        interval: steps between two updates of the factors.
        decay: of the factors, above 0 and below 1.
        threshold: above 1; None never pulls.
        reset: how far towards the identity, above 0 and at most 1; by default 1 for released and 0.1 for exact.
        hybrid: MKOR-H: after every ``period`` steps compare the relative decrease of the running mean of losses
            with the largest so far; after two periods in a row below a tenth of that, use the base optimizer
            alone. Losses come from the closure, from ``note_loss``, or from ``model`` if it returns its loss.
        period: steps, at least 1.
        average: called at every update of the factors with one flat tensor of all vectors, to average it in
            place over data-parallel ranks.

    Attributes:
        base: the base optimizer.
        factors: per layer its ``"left"`` [out, out] and ``"right"`` [in (+ 1), in (+ 1)]; none before the first
            update.

    Memory, in numbers beyond the base optimizer's: per layer ``out² + (in + 1)²``; ``2 · (in + out)`` more in
    evaluations that are recorded.

    Raises:
        TypeError: ``model`` is no module, or ``base_optimizer`` no optimizer that takes a gradient as it is.
        ValueError: a setting is out of range, or no layer of the model has factors.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), interval=2)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2, 3)).square().mean().backward()
    ...     optimizer.step()
    >>> [tuple(factor.shape) for factor in optimizer.factors["0"].values()]
    [(4, 4), (4, 4)]

    Source: Mozaffari, Li, Zhang, Mehri Dehnavi, NeurIPS 2023, arXiv 2306.01685.
    """

    _mixes = "the factors"
    needs_graph = False  # of the backward pass; see ``optex.stepping.ObservesEvaluations``

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Optimizer,
        variant: Literal["released", "exact"] = "released",
        *,
        interval: int = 10,
        decay: float = 0.95,
        threshold: float | None = 2.0,
        reset: float | None = None,
        hybrid: bool = False,
        period: int = 100,
        average: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"MKOR: model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(base_optimizer, Optimizer) or isinstance(base_optimizer, LBFGS):
            raise TypeError(
                "MKOR: base_optimizer must be a torch.optim.Optimizer that steps with the gradients that are "
                f"there, such as SGD(model.parameters(), lr=0.1), got {type(base_optimizer).__name__}"
            )
        if not isinstance(variant, str) or variant not in UPDATES:
            raise ValueError(f"MKOR: variant must be one of {', '.join(UPDATES)}, got {shown(variant)}")
        self.model: nn.Module = model
        self.variant: Literal["released", "exact"] = variant
        self.interval: int = check_integer("MKOR", "interval", interval)
        self.decay: float = check_number("MKOR", "decay", decay, most=1, open_below=True, open_above=True)
        self.threshold: float | None = (
            None
            if threshold is None
            else check_number("MKOR", "threshold", threshold, least=1, open_below=True)
        )
        reset = (1.0 if variant == "released" else 0.1) if reset is None else reset
        self.reset: float = check_number("MKOR", "reset", reset, most=1, open_below=True)
        self.hybrid: bool = check_flag("MKOR", "hybrid", hybrid)
        self.period: int = check_integer("MKOR", "period", period)
        self.average: Callable[[Tensor], Any] | None = average
        self.factors: dict[str, dict[str, Tensor]] = {}
        self._switch = watch()
        self._recalled: tuple[Vectors, Tensor | None] | None = None
        self._drafting = False
        self._warned_of_losses = False
        self._capture = Capture()
        self.steps = 0  # last: it decides what is recorded next
        super().__init__(base_optimizer)
        self._attach()
        if self.hybrid:
            self._capture.listen(model)
        if not self._layers():
            raise ValueError(
                "MKOR: no layer of the model has factors: none is a torch.nn.Linear or a Conv2d of one group "
                "whose weight base_optimizer steps. Use base_optimizer alone"
            )

    @classmethod
    def with_sgd(
        cls,
        model: nn.Module,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> MKOR:
        """Around SGD with momentum, which the authors' code has inside.

        Args:
            model: as above.
            lr, momentum, weight_decay: of ``torch.optim.SGD``.
            settings: further arguments of ``MKOR``.
        """
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check_number("MKOR", name, value)
        base = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        return cls(model, base, **settings)

    # ------------------------------------------------------------------ layers and hooks

    def _layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        return layers_of(self.model, (p for group in self.param_groups for p in group["params"]))

    def _attach(self) -> None:
        for name, module in self._layers().items():
            self._capture.attach(name, module)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; layers whose weights are in it get factors."""
        if self._ready:
            self.base.add_param_group(param_group)
            self._attach()

    def remove(self) -> None:
        """Remove the hooks from the model; further steps use the factors as they are."""
        self._capture.detach()

    def __enter__(self) -> MKOR:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def switched(self) -> bool:
        """Whether MKOR-H has switched to the base optimizer alone."""
        return self._switch["switched"]

    @property
    def steps(self) -> int:
        """Steps taken so far, without those on predictions."""
        return self.__dict__["steps"]

    @steps.setter
    def steps(self, count: int) -> None:
        # Set where a step ends, a state is loaded, or steps are taken back: what was recorded is then outdated.
        self.__dict__["steps"] = count
        self._capture.clear()
        self._arm()

    def _arm(self) -> None:
        """Record evaluations only if the next step uses them."""
        due = self._capture.observed or self.steps % self.interval == 0
        self._capture.armed = due and not self.switched

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer with the transformed gradients.

        Args:
            closure: clears the gradients, backpropagates, returns the loss; called once.

        Returns:
            What the closure returned; None without one.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; the message names its parameter. Parameters and state
                are as before.
            TypeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self.note_loss(loss)
        try:
            found = [checked_gradients("MKOR", i, group)[0] for i, group in enumerate(self.param_groups)]
        except BaseException:
            self._capture.clear()
            self._recalled = None
            raise
        if not any(found):
            return loss
        if not self._drafting:
            self._take_in()
        with self._transformed():
            self.base.step()
        if not self._drafting:
            if self.hybrid and not self.switched and (self.steps + 1) % self.period == 0:
                self._judge()
            self.steps += 1
        return loss

    def _take_in(self) -> None:
        """Update the factors, where they are due, and the running mean of losses."""
        due = self.steps % self.interval == 0 and not self.switched
        self._capture.observed = self._recalled is not None
        if self._recalled is not None:
            vectors, loss = self._recalled
        else:
            loss, vectors = self._capture.loss, self._capture.take() if due else {}
        self._recalled = None
        if due and vectors:
            self._update(vectors)
        if self.hybrid and loss is not None and not self.switched:
            maximises = any(group.get("maximize") for group in self.param_groups)
            self._switch = noted(self._switch, -loss if maximises else loss)

    def _update(self, vectors: Vectors) -> None:
        if self.average is not None:
            vectors = _averaged(vectors, self.average)
        home = next(iter(vectors.values()))[0].device
        sums = [mean.sum() + gradient.sum() for mean, gradient in vectors.values()]
        finite = torch.stack([total.to(home, torch.float64) for total in sums]).isfinite().tolist()
        update, changed = UPDATES[self.variant], []
        for (name, (mean, gradient)), usable in zip(vectors.items(), finite, strict=True):
            if not usable:
                warn(
                    f"MKOR: what came into layer {name!r}, or the gradient of what left it, is not finite; its "
                    "factors are left as they are",
                    NonFiniteWarning,
                )
                continue
            pair = self.factors.setdefault(name, {"left": _identity(gradient), "right": _identity(mean)})
            update(pair["left"], gradient, self.decay)
            update(pair["right"], mean, self.decay)
            changed += [pair["left"], pair["right"]]
        if self.threshold is not None:
            stabilised(changed, self.threshold, self.reset)

    @contextmanager
    def _transformed(self) -> Iterator[None]:
        """The parameters' ``.grad`` are the transformed gradients inside, and the gradients again after."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for name, pair in self.factors.items():
                module = self.model.get_submodule(name)
                weight, bias = module._parameters["weight"], module._parameters.get("bias")
                if weight is None or weight.grad is None:
                    continue
                bias_gradient = None if bias is None else bias.grad
                new, new_bias = preconditioned(pair["left"], pair["right"], weight.grad, bias_gradient)
                before.append((weight, weight.grad))
                weight.grad = new
                if bias is not None and bias_gradient is not None:
                    before.append((bias, bias_gradient))
                    bias.grad = new_bias
            yield
        finally:
            for p, gradient in before:
                p.grad = gradient

    # ------------------------------------------------------------------ MKOR-H

    def note_loss(self, loss: Any) -> None:
        """Tell MKOR-H the loss of the next step, where neither closure nor model returns it.

        Args:
            loss: a number, or a tensor [].

        Under ``OptEx`` call it in the objective.
        """
        if self.hybrid:
            self._capture.loss = torch.as_tensor(loss).detach()

    def _judge(self) -> None:
        """Whether to switch, at a period's end."""
        if self._switch["mean"] is None and not self._warned_of_losses:
            self._warned_of_losses = True
            warn(
                "MKOR: hybrid=True, and no loss was seen; call step(closure), or note_loss(loss) before every "
                "step (under OptEx in the objective). Until then nothing is switched",
                UserWarning,
            )
        self._switch = judged(self._switch)
        if self.switched:
            self.factors = {}

    # ------------------------------------------------------------------ under OptEx

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Steps inside are on predictions: they use the factors as they are, and are not counted."""
        before, self._drafting = self._drafting, True
        self._capture.clear()  # left by an evaluation that failed
        self._arm()
        try:
            yield
        finally:
            self._drafting = before

    def observe(self) -> tuple[Vectors, Tensor | None]:
        """Return the vectors and the loss of the evaluation that just ended, and forget them."""
        loss = self._capture.loss
        vectors = self._capture.take()
        self._capture.observed = True
        self._arm()
        return vectors, loss

    def recall(self, observation: tuple[Vectors, Tensor | None]) -> None:
        """Give the next step what was observed in the evaluation whose gradient it uses."""
        self._recalled = observation

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with one more entry, ``"mkor"``: factors, steps, MKOR-H's losses."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        own = {
            "steps": self.steps,
            "factors": {name: dict(pair) for name, pair in self.factors.items()},
            "switch": dict(self._switch),
        }
        state = {**self.base.state_dict(), _STATE_KEY: own}
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state; from one of the base optimizer alone without factors.

        Raises:
            ValueError: it is of other layers or parameters; the optimizer is as it was.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        own = state_dict.pop(_STATE_KEY, {"steps": 0, "factors": {}, "switch": watch()})
        owner = "MKOR.load_state_dict"
        steps = saved_integer(owner, own, "steps", least=0)
        factors = self._loaded_factors(saved_entry(owner, own, "factors"))
        losses = saved_entry(owner, own, "switch")
        switch = {key: saved_entry(owner, losses, key) for key in watch()}
        self.base.load_state_dict(state_dict)
        self.factors, self._switch, self._recalled = factors, switch, None
        self.steps = steps
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _loaded_factors(self, saved: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        owner, layers = "MKOR.load_state_dict", self._layers()
        loaded: dict[str, dict[str, Tensor]] = {}
        for name, pair in saved.items():
            if name not in layers:
                raise ValueError(
                    f"{owner}: the saved state has factors of a layer {name!r}, and the model has no such "
                    "layer; load the state of a model built like this one"
                )
            weight, bias = layers[name].weight, layers[name].bias
            wide = torch.promote_types(weight.dtype, torch.float32)
            sizes = weight.shape[0], weight[0].numel() + (bias is not None)
            loaded[name] = {
                side: saved_tensor(owner, pair, side, (size, size)).to(weight.device, wide, copy=True)
                for side, size in zip(("left", "right"), sizes, strict=True)
            }
        return loaded

    def __repr__(self) -> str:
        return (
            f"MKOR(variant={self.variant!r}, interval={self.interval}, hybrid={self.hybrid}, base={self.base})"
        )


def _identity(like: Tensor) -> Tensor:  # [d] to [d, d]
    return torch.eye(like.shape[0], dtype=like.dtype, device=like.device)


def _averaged(vectors: Vectors, average: Callable[[Tensor], Any]) -> Vectors:
    """The vectors after ``average`` changed them in place, as one tensor."""
    pieces = [piece for pair in vectors.values() for piece in pair]
    flat = torch.cat([piece.to(pieces[0]) for piece in pieces])
    average(flat)
    parts = [part.to(piece) for part, piece in zip(flat.split([len(p) for p in pieces]), pieces, strict=True)]
    return {name: (parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(vectors)}
