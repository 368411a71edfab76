"""SCALE: column-normalised SGD, with momentum in the last layer alone.

Athanasios Glentis, Jiaxiang Li, Andi Han, Mingyi Hong, "A Minimalist Optimizer Design for LLM Pretraining",
arXiv 2506.16659, 2025; in its third version "Memory-Efficient LLM Pretraining via Minimalist Optimizer Design".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

from optex.checks import check_number, shown
from optex.optimizers.step_rule import StepRule

__all__ = ["ROLES", "SCALE", "scale_param_groups"]

ROLES: Final = ("hidden", "embedding", "last", "vector")
_TIED: Final = ("last", "embedding")


@final
class SCALE(StepRule):
    """Stochastic column-normalised last-layer momentum: steps of a known size, with little state.

    Algorithm 1 of the paper. For a matrix with gradient G of shape [out, in]:

        M = momentum · M + (1 − momentum) · G in the last layer, M = G elsewhere
        W[i, :] ← W[i, :] − lr · M[i, :] / max(rms(M[i, :]), eps),    rms(v) = ‖v‖₂ / √in

    A *column* holds the weights of one output: column i of θ where a layer is x ↦ x θ, and row i of the weight
    [out, in] that ``torch.nn.Linear`` keeps. An embedding [symbols, width] maps a symbol to ``width`` outputs,
    so its columns are columns here, too. The paper divides a column by its norm ‖M[i, :]‖₂; its released code
    and this class divide by the root mean square: lr is the root mean square of a step, whatever the width.

    Tensors of less than two dimensions are stepped by AdamW.

    Memory: M for the last layer, and AdamW's two moments and a counter for each vector: #last + 2 · #vectors
    numbers, and one more for each vector.

    A group's ``role`` says what its matrices are; :func:`scale_param_groups` finds the roles in a model.

    - ``"hidden"``: [out, ...]; a column has one index in the first dimension: a convolution's kernels count as
      [out, in · height · width]. No state.
    - ``"embedding"``: [..., width]; a column has one index in the last dimension. No state.
    - ``"last"``: as hidden, with momentum.
    - ``"vector"``: AdamW, whatever the shape.

    Args:
        params: groups with a role, or parameters, all of the one ``role``.
        lr: root mean square of a matrix's step, and AdamW's rate; at least 0. Published: 1e-3 up to 350 million
            parameters, 2e-4 for a billion, 1e-4 for seven, with a warm-up over the first tenth, then a cosine.
        momentum: in the last layer, in [0, 1); 0 keeps no state.
        betas: AdamW's, each in [0, 1).
        eps: the least root mean square that is divided by, and AdamW's eps; above 0.
        weight_decay: decoupled: parameters are multiplied by 1 − lr · weight_decay; at least 0.
        role: of groups that name none.
        maximize: maximise instead.

    Raises:
        ValueError: a setting is out of range, a role unknown, or a group has a matrix and no role.

    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> optimizer = SCALE(layer.parameters(), lr=0.1, role="hidden")
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.tensor([1.0, 1.0, 2.0, 2.0])).square().sum().backward()
    >>> optimizer.step()
    >>> (layer.weight.detach() - before).square().mean(1).sqrt()
    tensor([0.1000, 0.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        role: str | None = None,
        maximize: bool = False,
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "role": role,
            "maximize": maximize,
        }
        super().__init__(params, settings)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        last: str | nn.Module | None = None,
        tied: str | None = None,
        **settings: Any,
    ) -> Self:
        """An optimizer of a model's parameters, with the roles of its layers.

        Args:
            model: whose parameters are optimised.
            lr: as above.
            last, tied: as in :func:`scale_param_groups`.
            settings: as above, but for ``role``.

        Raises:
            ValueError, TypeError: as :func:`scale_param_groups` and the class say.
        """
        return cls(scale_param_groups(model, last=last, tied=tied), lr, **settings)

    def _check(self, group: dict[str, Any]) -> None:
        check_number("SCALE", "lr", group["lr"])
        check_number("SCALE", "momentum", group["momentum"], most=1, open_above=True)
        betas = group["betas"]
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
            raise ValueError(f"SCALE: betas must be a pair of numbers, got {shown(betas)}")
        for i, beta in enumerate(betas):
            check_number("SCALE", f"betas[{i}]", beta, most=1, open_above=True)
        check_number("SCALE", "eps", group["eps"], open_below=True)
        check_number("SCALE", "weight_decay", group["weight_decay"])
        if group["role"] is None:
            for p in group["params"]:
                if p.ndim > 1:
                    raise ValueError(
                        f"SCALE: a group has a matrix {tuple(p.shape)} and no role, and which way its columns "
                        "lie is not known; take SCALE.of(model) or SCALE(scale_param_groups(model)), or set "
                        "the group's 'role' to 'hidden', 'embedding' or 'last'"
                    )
        elif group["role"] not in ROLES:
            raise ValueError(f"SCALE: role must be one of {', '.join(ROLES)}, got {shown(group['role'])}")

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = list(zip(parameters, gradients, strict=True))
        as_vectors = group["role"] == "vector"
        matrices = [pair for pair in pairs if pair[0].ndim > 1 and not as_vectors]
        vectors = [pair for pair in pairs if pair[0].ndim < 2 or as_vectors]
        if matrices:
            self._step_columns(group, *map(list, zip(*matrices, strict=True)))
        if vectors:
            self._step_adamw(group, *map(list, zip(*vectors, strict=True)))

    def _step_columns(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],  # each [out, ...], or [..., width] of an embedding
        gradients: list[Tensor],
    ) -> None:
        if group["role"] == "last" and group["momentum"]:
            gradients = self._momentum(group, parameters, gradients)
        # The step is M times one number a column, -lr / max(rms, eps): one fused product is added to the
        # parameters, and nothing of their size is allocated.
        dims = [_along(g, group["role"]) for g in gradients]
        factors = [
            torch.linalg.vector_norm(g, dim=dim, keepdim=True, dtype=_accurate(g.dtype))
            for g, dim in zip(gradients, dims, strict=True)
        ]
        counts = [(g.numel() // max(f.numel(), 1)) ** 0.5 for g, f in zip(gradients, factors, strict=True)]
        torch._foreach_div_(factors, counts)
        torch._foreach_clamp_min_(factors, float(group["eps"]))
        torch._foreach_reciprocal_(factors)
        torch._foreach_mul_(factors, -group["lr"])
        factors = [f.to(p.dtype) for f, p in zip(factors, parameters, strict=True)]
        torch._foreach_addcmul_(parameters, gradients, factors)

    def _momentum(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        # Starts at 0 without bias correction: a column's size is divided out.
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        return buffers

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        states = [self._adamw_state(p) for p in parameters]
        steps = [state["step"] for state in states]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # Counters are on the CPU, where reading one waits for no device; a compiled graph needs tensors.
        counts = steps if torch.compiler.is_compiling() else [step.item() for step in steps]
        numerators = torch._foreach_div(means, [1 - beta1**count for count in counts])
        torch._foreach_mul_(numerators, -group["lr"])
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(denominators, float(group["eps"]))
        torch._foreach_addcdiv_(parameters, numerators, denominators)

    def _adamw_state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _along(gradient: Tensor, role: str) -> tuple[int, ...]:
    """The dimensions along which a column's root mean square is taken."""
    return tuple(range(gradient.ndim - 1)) if role == "embedding" else tuple(range(1, gradient.ndim))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which squares are summed: no 16-bit format."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def scale_param_groups(
    model: nn.Module,
    *,
    last: str | nn.Module | None = None,
    tied: str | None = None,
) -> list[dict[str, Any]]:
    """A model's parameters in groups by their role in SCALE, with their names.

    ``"last"`` are the matrices of the output layer, ``"embedding"`` those of all ``torch.nn.Embedding`` and
    ``EmbeddingBag``, ``"vector"`` tensors of less than two dimensions, ``"hidden"`` the rest. Empty groups are
    left out.

    Args:
        model: its layers are walked in the order in which they were registered.
        last: the output layer or its name in the model; None is the ``torch.nn.Linear`` that shares its weight
            with an embedding, or else the one registered last.
        tied: the role of a weight that is both the output layer's and an embedding's: ``"last"``, a column for
            each symbol, with momentum, or ``"embedding"``, a column for each coordinate of the width, without.
            There is no default, as these are two different optimizers.

    Returns:
        Groups for :class:`SCALE`: ``params`` with names, and ``role``. A setting added to one, such as ``lr``,
        is that group's own.

    Raises:
        ValueError: there is no output layer, or ``last`` names none; it shares its weight and ``tied`` is
            missing, or ``tied`` is given and nothing is shared.
        TypeError: ``model`` is no module.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    >>> for group in scale_param_groups(model):
    ...     print(group["role"], [name for name, _ in group["params"]])
    hidden ['1.weight']
    embedding ['0.weight']
    last ['2.weight']
    vector ['1.bias', '2.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"scale_param_groups: model must be a torch.nn.Module, whose layers are looked at, got "
            f"{type(model).__name__}; for parameters alone set the groups' 'role'"
        )
    if tied is not None and tied not in _TIED:
        raise ValueError(f"scale_param_groups: tied must be one of {', '.join(_TIED)}, got {shown(tied)}")
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    tables = {p for m in embeddings for p in _matrices(m)}
    name, head = _output_layer(model, last, tables)
    roles = dict.fromkeys(tables, "embedding") | dict.fromkeys(_matrices(head), "last")
    shared = tables & set(_matrices(head))
    if shared and tied is None:
        raise ValueError(
            f"scale_param_groups: {name!r} shares its weight with an embedding; say which role it has, "
            "tied='last' (a column for each symbol, with momentum) or tied='embedding' (a column for each "
            "coordinate, without)"
        )
    if tied is not None:
        if not shared:
            raise ValueError(
                f"scale_param_groups: tied={tied!r}, but {name!r} shares no weight with an embedding; leave it "
                "out, or name the output layer with last="
            )
        roles |= dict.fromkeys(shared, tied)
    groups: dict[str, list[tuple[str, Tensor]]] = {role: [] for role in ROLES}
    for key, p in model.named_parameters():
        groups[roles.get(p, "hidden") if p.ndim > 1 else "vector"].append((key, p))
    return [{"params": named, "role": role} for role, named in groups.items() if named]


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim > 1]


def _output_layer(
    model: nn.Module, last: str | nn.Module | None, tables: set[nn.Parameter]
) -> tuple[str, nn.Module]:
    """The output layer and its name."""
    modules = dict(model.named_modules())
    if last is None:
        linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and _matrices(m)}
        tied = {name: m for name, m in linear.items() if tables & set(_matrices(m))}
        if not linear:
            raise ValueError(
                f"scale_param_groups: {type(model).__name__} has no torch.nn.Linear that could be the last "
                "layer; name the output layer with last="
            )
        return list((tied or linear).items())[-1]
    for name, module in modules.items():
        if module is last or name == last:
            if not _matrices(module):
                raise ValueError(f"scale_param_groups: last={name!r} has no matrix among its parameters")
            return name, module
    known = ", ".join(name for name, module in modules.items() if name and _matrices(module))
    which = repr(last) if isinstance(last, str) else f"a {type(last).__name__} that is not in the model"
    raise ValueError(f"scale_param_groups: last must be one of the model's layers ({known}), got {which}")
