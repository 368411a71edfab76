"""Which torch optimizers can be the base, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optex import optimizers
from optex.checks import shown

__all__ = [
    "COUNTERS",
    "ELEMENTWISE",
    "MODEL_OPTIMIZERS",
    "OPTIMIZERS",
    "REFUSED",
    "base_optimizer",
    "check_base",
    "check_name",
    "check_settings",
    "default_rate",
]

OPTIMIZERS: Final[dict[str, Callable[..., Optimizer]]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "nag": optimizers.NAG,
    "triple-momentum": optimizers.TripleMomentum,
    "heavy-ball": optimizers.HeavyBall,
    "adagrad-norm": optimizers.AdaGradNorm,
    "adahessian": optimizers.AdaHessian,
    "n-igt": partial(optimizers.NIGT, rest="extrapolated"),
    "m-fac": partial(optimizers.MFAC, window_size=64),  # 1024 gradients would be most of a short run
}
if hasattr(torch.optim, "Muon"):  # torch 2.9 and later; two-dimensional parameters only
    OPTIMIZERS["muon"] = torch.optim.Muon

# Built from a module, whose layers they have to know, and not from its parameters.
MODEL_OPTIMIZERS: Final[dict[str, Callable[..., Optimizer]]] = {
    "scale": optimizers.SCALE.of,
    "mkor": partial(optimizers.MKOR.with_sgd, momentum=0.9),
    "mkor-h": partial(optimizers.MKOR.with_sgd, momentum=0.9, hybrid=True),
}

# They step every coordinate by itself, so that a slice of the parameters can be stepped alone.
ELEMENTWISE: Final[frozenset[type[Optimizer]]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)

# Entries of their state that are one number a parameter; by name, as a parameter may be one number itself.
COUNTERS: Final = ("step", "mu_product", "eta", "mu")

# Reasons, for the message of ``check_base``.
REFUSED: Final[dict[type[Optimizer], str]] = {
    optimizers.GNS: "it evaluates its closure several times a step, so there is no single next gradient to "
    "predict; optex.minimize_gns evaluates several of its trials at once",
    torch.optim.LBFGS: "it evaluates its closure several times a step, so there is no single next gradient to "
    "predict",
    optimizers.HARPG: "a step needs a product with the Hessian at a random point between the last two "
    "iterates, and only gradients are predicted; NIGT(params, rest='extrapolated') can be the base",
    optimizers.MeZO: "it evaluates its closure twice a direction, at shifted parameters, so no gradient is "
    "there to predict; hand rounds an SPSASource(objective, parameters, queries=16) and SGD instead",
    torch.optim.SparseAdam: "it takes sparse gradients only, and the history is dense",
}


def base_optimizer(name: str, of: nn.Module | Iterable[Tensor], **settings: Any) -> Optimizer:
    """The optimizer of that name with its own defaults but for ``settings``.

    Args:
        name: a key of ``OPTIMIZERS`` or ``MODEL_OPTIMIZERS``.
        of: a module, or its parameters; those of ``MODEL_OPTIMIZERS`` need the module.
        settings: keywords of the optimizer.

    Raises:
        ValueError: the name is unknown, or the optimizer needs a module and there is none.
    """
    check_name(name)
    if name in OPTIMIZERS:
        return OPTIMIZERS[name](of.parameters() if isinstance(of, nn.Module) else of, **settings)
    if not isinstance(of, nn.Module):
        raise ValueError(f"optimizer: {name} has to know the layers; hand it a torch.nn.Module")
    return MODEL_OPTIMIZERS[name](of, **settings)


def check_name(name: str) -> None:
    """Refuse what is no optimizer's name.

    Raises:
        ValueError: it is neither in ``OPTIMIZERS`` nor in ``MODEL_OPTIMIZERS``.
    """
    known = (*OPTIMIZERS, *MODEL_OPTIMIZERS)
    if name not in known:
        raise ValueError(f"optimizer: {shown(name)} is not one of {', '.join(known)}")


_RATES: Final[dict[str, float]] = {
    "sgd": 0.1,
    "momentum": 0.05,
    "nesterov": 0.05,
    "adagrad": 0.1,
    "adagrad-norm": 1.0,
    "adadelta": 1.0,
    "asgd": 0.1,
    "muon": 0.02,
    "nag": 0.05,
    "triple-momentum": 0.05,
    "heavy-ball": 0.02,
    "n-igt": 0.1,
    "adahessian": 0.15,
    "mkor": 0.05,
    "mkor-h": 0.05,
}


def default_rate(optimizer: str) -> float:
    """The learning rate where none is given, by the optimizer's name; 0.01 unless another suits it better.

    >>> default_rate("adam")
    0.01
    """
    return _RATES.get(optimizer, 0.01)


def check_settings(
    owner: str,
    optimizer: str | Callable[..., Optimizer],
    settings: Mapping[str, Any],
    remedies: Mapping[str, str],
) -> None:
    """Refuse keywords that the optimizer does not take.

    Args:
        owner: the function that they were handed to, for the message.
        optimizer: a key of ``OPTIMIZERS``, or a function that makes an optimizer.
        settings: the keywords.
        remedies: what to do instead, by keyword, for those known from other libraries.

    Raises:
        TypeError: one is unknown; the message names it.
    """
    factory = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if factory is None:  # an unknown name; the error for that is better
        return
    try:
        known = inspect.signature(factory).parameters
    except ValueError:  # a builtin that does not tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in settings:
        if name not in known:
            taken = ", ".join(key for key in known if key not in ("params", "lr"))
            remedy = remedies.get(name, f"optimizer {optimizer!r} takes {taken}")
            raise TypeError(f"{owner}: there is no argument {name!r}; {remedy}")


def check_base(base: Any) -> None:
    """Refuse what cannot be a base optimizer.

    Raises:
        TypeError, ValueError: it cannot; the message says why.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"OptEx: base must be a torch.optim.Optimizer instance, got {type(base).__name__}; for example "
            "OptEx(torch.optim.Adam(model.parameters(), lr=1e-3))"
        )
    for refused, reason in REFUSED.items():
        if isinstance(base, refused):
            raise TypeError(f"OptEx: {type(base).__name__} cannot be the base: {reason}")
    parameters = [p for group in base.param_groups for p in group["params"]]
    if not any(p.requires_grad and p.numel() for p in parameters):
        raise ValueError(
            "OptEx: base has no parameter that requires a gradient and holds a number; there is nothing to "
            "optimise"
        )
    for p in parameters:
        if p.is_complex():
            raise TypeError(
                "OptEx: base has complex parameters; optimise torch.view_as_real(parameter) instead"
            )
        if p.requires_grad and p.layout is not torch.strided:
            raise TypeError("OptEx: base has sparse parameters; use dense ones (parameter.to_dense())")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            "OptEx: base was built with differentiable=True; drafted steps are taken back, so there is nothing "
            "to differentiate through. Build it without"
        )
