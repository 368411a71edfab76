"""The states of torch's random generators: read, and set."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["generator_states", "set_generator_states"]


def generator_states() -> list[Tensor]:
    """The states of torch's generators: the CPU's, then every CUDA device's if CUDA is in use."""
    states = [torch.get_rng_state()]
    return states + torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Set the generators to what ``generator_states`` answered; CUDA's only where as many devices are there."""
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1 and torch.cuda.is_available() and torch.cuda.device_count() == len(states) - 1:
        torch.cuda.set_rng_state_all([state.cpu() for state in states[1:]])
