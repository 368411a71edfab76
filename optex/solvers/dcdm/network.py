"""A small convolutional network that proposes directions on a grid."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from optex.checks import check_integer

__all__ = ["DirectionNetwork"]

_OWNER: Final = "DirectionNetwork"


class DirectionNetwork(nn.Module):
    """From a residual on a grid to a direction on it, by convolutions alone; one serves grids of any size.

    The published one has 16 channels and 3 × 3 × 3 filters: a linear convolution and one residual pair on the
    grid; averages of 2 × 2 × 2 cells; three pairs on the coarse grid; repeated back onto the fine one, with
    what was there added; two pairs; and a linear map to one channel. ``levels`` nests it: a direction has to
    carry what happens at one end of the grid to the other, and every further level doubles how far it sees.

    Args:
        dimension: of the grid, 2 or 3.
        channels: of every convolution.
        levels: coarser grids below the given one; the published network has 1.

    Raises:
        ValueError: dimension, channels or levels is out of range.

    >>> network = DirectionNetwork(2, channels=4)
    >>> network(torch.ones(8, 7)).shape, network(torch.ones(5, 16, 16)).shape
    (torch.Size([8, 7]), torch.Size([5, 16, 16]))
    """

    def __init__(self, dimension: int = 2, channels: int = 16, *, levels: int = 1) -> None:
        super().__init__()
        self.dimension: int = check_integer(_OWNER, "dimension", dimension, least=2, most=3)
        channels = check_integer(_OWNER, "channels", channels)
        self.levels: int = check_integer(_OWNER, "levels", levels)
        convolution = nn.Conv2d if dimension == 2 else nn.Conv3d
        self.first: nn.Conv2d | nn.Conv3d = convolution(1, channels, 3, padding=1)
        self.cycle: nn.Module = _Cycle(dimension, channels, self.levels)
        self.last: nn.Conv2d | nn.Conv3d = convolution(channels, 1, 1)

    def forward(
        self,
        residual: Tensor,  # [..., *grid]
    ) -> Tensor:  # [..., *grid]
        """Directions for residuals; what stands before the grid is the batch.

        Raises:
            ValueError: there are fewer dimensions than the grid has.
        """
        if residual.ndim < self.dimension:
            raise ValueError(
                f"{_OWNER}: a residual must be [..., *grid] with a grid of {self.dimension} dimensions, got"
                f" shape {tuple(residual.shape)}"
            )
        fields = residual.reshape(-1, 1, *residual.shape[-self.dimension :])
        return self.last(self.cycle(self.first(fields))).view(residual.shape)


class _Pair(nn.Module):
    """x + relu(conv(relu(conv(x))))."""

    def __init__(self, dimension: int, channels: int) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimension == 2 else nn.Conv3d
        self.one: nn.Conv2d | nn.Conv3d = convolution(channels, channels, 3, padding=1)
        self.two: nn.Conv2d | nn.Conv3d = convolution(channels, channels, 3, padding=1)

    def forward(self, fields: Tensor) -> Tensor:  # [batch, channels, *grid], twice
        return fields + torch.relu(self.two(torch.relu(self.one(fields))))


class _Cycle(nn.Module):
    """Down to the coarser grids and back, as a cycle of multigrid goes."""

    def __init__(self, dimension: int, channels: int, levels: int) -> None:
        super().__init__()
        self.dimension: int = dimension
        self.down: nn.Module = _Pair(dimension, channels)
        self.coarse: nn.Module = (
            _Cycle(dimension, channels, levels - 1)
            if levels > 1
            else nn.Sequential(*(_Pair(dimension, channels) for _ in range(3)))
        )
        self.up: nn.Module = nn.Sequential(_Pair(dimension, channels), _Pair(dimension, channels))

    def forward(self, fields: Tensor) -> Tensor:  # [batch, channels, *grid], twice
        fine = self.down(fields)
        pool = functional.avg_pool2d if self.dimension == 2 else functional.avg_pool3d
        coarse = self.coarse(pool(fine, 2, ceil_mode=True))
        raised = functional.interpolate(coarse, scale_factor=2, mode="nearest")
        inside = (..., *(slice(size) for size in fine.shape[2:]))  # an odd grid has half a coarse cell too few
        return self.up(raised[inside] + fine)
