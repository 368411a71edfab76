"""Calls of a module with other parameters than its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["called_with", "parameter_names"]


def called_with(module: nn.Module, values: Mapping[str, Tensor], *arguments: Any) -> Any:
    """``torch.func.functional_call``, also where a submodule is registered under several names.

    functional_call swaps a parameter under each of its names in turn. The second name of a submodule that has
    two already shows the new value, which is then put back as the old one: the module loses its parameter.
    Here every submodule is swapped under one name.

    Args:
        module: what is called.
        values: in place of parameters, by the names of ``named_parameters``, each of the parameter's shape;
            a parameter that several submodules share has one.
        arguments: of the call.

    >>> import torch
    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> twice = torch.nn.Sequential(layer, layer)
    >>> called_with(twice, {"0.weight": torch.tensor([[3.0]])}, torch.ones(1)).item()
    9.0
    >>> twice[1].weight is layer.weight
    True
    """
    new = {id(p): values[name] for name, p in module.named_parameters() if name in values}
    swapped = {
        f"{path}.{name}" if path else name: new[id(p)]
        for path, part in module.named_modules()
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in new
    }
    return functional_call(module, swapped, arguments, tie_weights=False)


def parameter_names(owner: str, module: nn.Module | None, parameters: Sequence[Tensor]) -> list[str]:
    """The names of an objective's parameters, by which ``vectorized=True`` swaps them.

    Raises:
        TypeError: the objective is no module, or one of them is not its own.
    """
    if module is None:
        raise TypeError(
            f"{owner}: vectorized=True swaps parameters under torch.func, and needs the torch.nn.Module that "
            "owns them as its objective, forward(batch) -> loss; pass that, or vectorized=False"
        )
    known = {id(p): name for name, p in module.named_parameters()}
    if any(id(p) not in known for p in parameters):
        raise TypeError(
            f"{owner}: vectorized=True, and a parameter is not the objective's own; pass its own, or "
            "vectorized=False"
        )
    return [known[id(p)] for p in parameters]
