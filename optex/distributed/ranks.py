"""Processes that work on one run together: the few messages they exchange, every byte of them counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from optex.errors import RankLostError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "Traffic"]

_DIMENSIONS = (("proxies",), ("proxies", "data"))


@dataclass
class Traffic:
    """What this rank sent and received in collectives, in bytes; set the fields to 0 to count anew.

    A sum of n bytes over R ranks counts as 2 n (R - 1) / R each way, and a gathering as n (R - 1): what the
    ring algorithms move, and the least that any could. What a rank keeps to itself is not counted.

    Attributes:
        sent, received: bytes of rows, which grow with d.
        small: bytes sent (and as many received) in sums and headers, whose size does not depend on d.
        messages: collectives of either kind; each costs a latency.
    """

    sent: float = 0
    received: float = 0
    small: float = 0
    messages: int = 0


class Ranks:
    """A process group laid out as proxies × data.

    Ranks along "proxies" evaluate different points, those along "data" parts of the same batch.

    Args:
        mesh: with the dimensions ("proxies",) or ("proxies", "data"); None puts all ranks along "proxies".
        device: where vectors are.

    Attributes:
        group: the process group of all ranks.
        size: R, the number of ranks.
        rank: this one's number within the group.
        proxies, data: ranks along the two dimensions; size = proxies · data.
        place: this rank's place along both.
        places: every rank's place along both.
        traffic: bytes that this rank sent and received.

    Raises:
        RuntimeError: ``torch.distributed`` has no process group.
        ValueError: the mesh has other dimensions.
        RankLostError: in a message, another rank does not take part.
    """

    def __init__(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedEvaluator: torch.distributed has no process group; start the script with torchrun "
                "and call torch.distributed.init_process_group() first"
            )
        self._device_of_rows = device
        self.group: dist.ProcessGroup | None
        self.size: int
        self.proxies: int
        self.data: int
        self.places: list[tuple[int, int]]
        if mesh is None:
            self.group = dist.group.WORLD
            self.size = dist.get_world_size()
            self.proxies, self.data = self.size, 1
            self.places = [(rank, 0) for rank in range(self.size)]
            self._proxies_group, self._data_group = self.group, None
            self._in_turn = list(range(self.size))  # places of the proxies' group, in its order
        else:
            if mesh.mesh_dim_names not in _DIMENSIONS:
                raise ValueError(
                    f"DistributedEvaluator: mesh must have the dimensions ('proxies',) or ('proxies', 'data'), "
                    f"got {mesh.mesh_dim_names}; as init_device_mesh('cuda', (4, 2), "
                    "mesh_dim_names=('proxies', 'data'))"
                )
            self.group = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
            self.size = mesh.size()
            self.proxies, self.data = mesh.size(0), mesh.size(1) if mesh.ndim == 2 else 1
            table = mesh.mesh.view(self.proxies, self.data)
            where = {int(table[p, k]): (p, k) for p in range(self.proxies) for k in range(self.data)}
            self.places = [where[rank] for rank in dist.get_process_group_ranks(self.group)]
            self._proxies_group = mesh.get_group("proxies")
            self._data_group = mesh.get_group("data") if mesh.ndim == 2 else None
            self._in_turn = [where[rank][0] for rank in dist.get_process_group_ranks(self._proxies_group)]
        self.rank: int = dist.get_rank(self.group)
        self.place: tuple[int, int] = self.places[self.rank]
        # gloo moves what lies in main memory only.
        on_host = dist.get_backend(self.group) == "gloo"
        self._device = torch.device("cpu") if on_host else device
        self.traffic: Traffic = Traffic()

    @cached_property
    def flat_mesh(self) -> DeviceMesh:
        """All ranks in a row, for tensors split among them."""
        from torch.distributed.device_mesh import DeviceMesh  # a second to import

        return DeviceMesh.from_group(self.group, self._device_of_rows.type)  # type: ignore[arg-type]

    def shares(self, count: int) -> list[int]:
        """How many of ``count`` rows, taken in order, each place along the proxies has."""
        return [count // self.proxies + (p < count % self.proxies) for p in range(self.proxies)]

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a small tensor [...] over all ranks, with the same bits on each."""
        if self.size == 1:
            return values
        there = values.to(self._device, copy=True)
        with self._explained():
            dist.all_reduce(there, group=self.group)
        self._count_small(2 * _bytes(there) * (self.size - 1) / self.size)
        return there.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The small tensors [...] of all ranks, of one shape, by rank."""
        if self.size == 1:
            return [values]
        self._count_small(_bytes(values) * (self.size - 1))
        return self._gather(values, self.group, self.size)

    def gather_slices(self, values: Tensor) -> list[Tensor]:
        """The slices [width] of a long vector that the ranks hold, by rank."""
        self._count(_bytes(values) * (self.size - 1), _bytes(values) * (self.size - 1))
        return self._gather(values, self.group, self.size)

    def gather_shares(
        self,
        rows: Tensor,  # [m, d], this place's share
        shares: Sequence[int],  # rows of each place along the proxies, n in all
    ) -> Tensor:  # [n, d]
        """The rows of all places along the proxies, in their order."""
        padded = rows.new_zeros(max(shares), rows.shape[1])
        padded[: len(rows)] = rows
        self._count(_bytes(padded) * (self.proxies - 1), _bytes(padded) * (self.proxies - 1))
        found = self._gather(padded, self._proxies_group, self.proxies)
        by_place = dict(zip(self._in_turn, found, strict=True))
        return torch.cat([by_place[place][:share] for place, share in enumerate(shares)])

    def _gather(self, values: Tensor, group: dist.ProcessGroup | None, size: int) -> list[Tensor]:
        if size == 1:
            return [values]
        there = values.to(self._device).contiguous()
        result = [torch.empty_like(there) for _ in range(size)]
        with self._explained():
            dist.all_gather(result, there, group=group)
        return [tensor.to(values.device) for tensor in result]

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable objects of all ranks, by rank; for what is small and rare."""
        result: list[Any] = [None] * self.size
        with self._explained():
            dist.all_gather_object(result, value, group=self.group)
        return result

    def exchange(
        self,
        rows: Tensor,  # [n, width], for rank 0, then for rank 1, ...
        sent: Sequence[int],  # how many of them for each rank
        received: Sequence[int],  # how many come from each rank
    ) -> Tensor:  # [m, width], from rank 0, then from rank 1, ...
        """Send rows to the other ranks and receive theirs, all to all."""
        if self.size == 1:
            return rows
        there = rows.to(self._device).contiguous()
        result = there.new_empty(sum(received), rows.shape[1])
        with self._explained():
            dist.all_to_all_single(result, there, list(received), list(sent), group=self.group)
        row = rows.shape[1] * rows.element_size()
        self._count(row * (sum(sent) - sent[self.rank]), row * (sum(received) - received[self.rank]))
        return result.to(rows.device)

    def mean_over_data(self, rows: Tensor) -> Tensor:
        """Mean of the rows [n, d] over the ranks that evaluate parts of the same batches."""
        if self.data == 1:
            return rows
        there = rows.to(self._device, copy=True)
        with self._explained():
            dist.all_reduce(there, group=self._data_group)
        moved = 2 * _bytes(there) * (self.data - 1) / self.data
        self._count(moved, moved)
        return (there / self.data).to(rows.device)

    def _count(self, sent: float, received: float) -> None:
        self.traffic.sent += sent
        self.traffic.received += received
        self.traffic.messages += 1

    def _count_small(self, moved: float) -> None:
        self.traffic.small += moved
        self.traffic.messages += 1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(
                f"DistributedEvaluator: rank {self.rank} of {self.size} lost the others ({error}). One died "
                "or did not come along: all must run the same rounds on equally many batches. With torchrun "
                "--max-restarts the job starts anew and can go on from its last checkpoint; a round that "
                "is longer than the process group's timeout needs init_process_group(timeout=...)"
            ) from error


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
