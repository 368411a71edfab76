"""Weights of data sources, and the losses of a batch by source.

Pan et al.: *ScaleBiO: Scalable Bilevel Optimization for LLM Data Reweighting*, ACL 2025, arXiv 2406.19976.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from optex.checks import check_device, check_integer, shown

__all__ = ["SourceWeights", "mixed", "slope_of_mixture", "source_losses"]

_OWNER: Final = "SourceWeights"


class SourceWeights(nn.Module):
    """A weight for each of K data sources: q = softmax(p), equal at first.

    Args:
        sources: K, at least 2; or their names, no two alike.
        dtype, device: of the logits.

    Attributes:
        logits: p [K], the parameter that is optimised.
        names: of the sources, in their order.

    Raises:
        TypeError, ValueError: there are fewer than two sources, or names that are no strings or not distinct.

    Source: Pan et al., arXiv 2406.19976.

    >>> weights = SourceWeights(["plays", "noise"])
    >>> weights()
    tensor([0.5000, 0.5000], grad_fn=<SoftmaxBackward0>)
    >>> weights.mass(["plays"])
    0.5
    """

    def __init__(
        self,
        sources: int | Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.names: tuple[str, ...] = _names(sources)
        check_device(_OWNER, "device", device)
        logits = torch.zeros(len(self.names), dtype=dtype, device=device)
        if not logits.is_floating_point():
            raise TypeError(f"{_OWNER}: dtype must be floating-point, got {shown(dtype)}")
        self.logits: nn.Parameter = nn.Parameter(logits)

    def forward(self) -> Tensor:  # [K]
        """q."""
        return torch.softmax(self.logits, 0)

    def by_name(self) -> dict[str, float]:
        """The weight of each source."""
        return dict(zip(self.names, self().detach().tolist(), strict=True))

    def mass(self, names: Sequence[str]) -> float:
        """The weight of these sources together.

        Raises:
            ValueError: there is no source of such a name.
        """
        known = self.by_name()
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{_OWNER}: there is no source {unknown[0]!r}; there are {', '.join(self.names)}")
        return sum(known[name] for name in names)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:.3g}" for name, weight in self.by_name().items())


def _names(sources: Any) -> tuple[str, ...]:
    if isinstance(sources, int) and not isinstance(sources, bool):
        count = sources if sources < 2 else check_integer(_OWNER, "sources", sources)
        sources = [str(number) for number in range(count)]
    if not isinstance(sources, Sequence) or isinstance(sources, str):
        raise TypeError(f"{_OWNER}: sources must be their number, or a list of names, got {shown(sources)}")
    if wrong := [name for name in sources if not isinstance(name, str)]:
        raise TypeError(f"{_OWNER}: names of sources must be strings, got {shown(wrong[0])}")
    if len(sources) < 2:
        raise ValueError(
            f"{_OWNER}: there must be at least 2 sources to weigh, got {len(sources)}; split the data further, "
            "or train without weights"
        )
    if len(set(sources)) < len(sources):
        raise ValueError(f"{_OWNER}: two sources have one name, got {', '.join(sources)}")
    return tuple(sources)


# ---------------------------------------------------------------------- losses by source


def source_losses(
    owner: str,
    answer: Any,
    count: int,
) -> tuple[Tensor, Tensor]:  # [K], [K] bool
    """Each source's mean loss in a batch, 0 where it is absent; and which sources are present.

    Args:
        owner: for messages.
        answer: the user's: losses [K], or a pair of samples' losses [n] and their sources [n].
        count: K.

    Raises:
        TypeError, ValueError: it is neither, a number is no source's, or there are no samples at all.
    """
    if isinstance(answer, tuple):
        if len(answer) != 2 or not all(isinstance(part, Tensor) for part in answer):
            raise TypeError(f"{owner}: training must return losses [K], or a pair (losses [n], sources [n])")
        return _means(owner, *answer, count)
    if not isinstance(answer, Tensor):
        raise TypeError(
            f"{owner}: training must return a tensor of {count} losses, one a source, or a pair (losses [n], "
            f"sources [n]), got {type(answer).__name__}"
        )
    if answer.shape != (count,) or answer.is_complex():
        raise ValueError(
            f"{owner}: training must return {count} real losses, one a source, got shape "
            f"{tuple(answer.shape)} of {answer.dtype}; for losses of samples return (losses, sources)"
        )
    return answer, torch.ones(count, dtype=torch.bool, device=answer.device)


def _means(
    owner: str,
    losses: Tensor,  # [n]
    sources: Tensor,  # [n]
    count: int,
) -> tuple[Tensor, Tensor]:  # [K], [K] bool
    if losses.ndim != 1 or sources.shape != losses.shape or sources.is_floating_point():
        raise ValueError(
            f"{owner}: training must return losses [n] and whole numbers [n] that name their sources, got "
            f"shapes {tuple(losses.shape)} and {tuple(sources.shape)} of {sources.dtype}"
        )
    if not losses.numel():
        raise ValueError(f"{owner}: a batch has no samples of any source; drop it")
    if int(sources.min()) < 0 or int(sources.max()) >= count:
        raise ValueError(
            f"{owner}: sources are numbered from 0 to {count - 1}, got {int(sources.min())} to "
            f"{int(sources.max())}"
        )
    places = sources.to(losses.device, torch.int64)
    sizes = torch.bincount(places, minlength=count)
    sums = losses.new_zeros(count).index_add(0, places, losses)
    return sums / sizes.clamp_min(1), sizes > 0


def mixed(
    weights: Tensor,  # [K]
    losses: Tensor,  # [K]
    present: Tensor,  # [K] bool
) -> Tensor:  # []
    """Σ q_k l_k / Σ q_k over the sources that are present, so that the weights of a batch sum to one."""
    share = weights * present
    return (share / share.sum()) @ losses


def slope_of_mixture(
    weights: Tensor,  # [K]
    values: Tensor,  # [K]
    present: Tensor,  # [K] bool
) -> Tensor:  # [K]
    """The derivative of ``mixed`` in the logits; 0 for sources that are absent."""
    share = weights * present
    share = share / share.sum()
    # Where a source has no weight at all, 0 is its slope, whatever its value.
    kept = torch.where(present, values, torch.zeros_like(values))
    return share * (kept - share @ kept)
