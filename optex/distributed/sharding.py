"""Vectors split among ranks: each keeps and steps a slice; sums over coordinates go through all ranks."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex import linalg
from optex.distributed.ranks import Ranks
from optex.stepping import COUNTERS, GradientMask, Hyperparameters, ParameterVector, Stepper
from optex.vector_space import VectorSpace

__all__ = ["ShardedSpace", "ShardedStepper", "ShardedVector", "joined_state"]


class ShardedSpace(VectorSpace):
    """Vectors of length d in slices of equal width, one a rank; the last slices are padded with zeros.

    Attributes:
        ranks: the processes that hold the slices.
        width: of a slice.
        start, stop: the coordinates in this rank's slice, without padding.
    """

    is_split: bool = True

    def __init__(self, dimension: int, ranks: Ranks) -> None:
        super().__init__(dimension)
        self.ranks: Ranks = ranks
        self.width: int = -(-dimension // ranks.size)
        self.start: int = min(ranks.rank * self.width, dimension)
        self.stop: int = min(self.start + self.width, dimension)

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        flat = self.ranks.sum(torch.cat([part.reshape(-1).to(torch.float64) for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def norms(self, rows: Iterable[Tensor]) -> Tensor:
        return self.total(torch.cat([linalg.squared_norms(row[None]) for row in rows]))[0].sqrt()

    def finite(self, rows: Tensor) -> Tensor:
        return self.total((~super().finite(rows)).to(torch.float64))[0] == 0

    def broadcast(self, values: Tensor) -> Tensor:
        return self.ranks.sum(values if self.ranks.rank == 0 else torch.zeros_like(values))

    def whole(self, rows: Tensor) -> Tensor:
        """The rows [..., width] as a ``DTensor`` [..., d], which no rank holds in full."""
        from torch.distributed.tensor import DTensor, Shard  # seconds to import, and few need it

        shape = (*rows.shape[:-1], self.dimension)
        return DTensor.from_local(
            rows[..., : self.stop - self.start].contiguous().clone(),
            self.ranks.flat_mesh,
            [Shard(rows.ndim - 1)],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def local(self, rows: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if isinstance(rows, DTensor):
            here = rows.to_local()
            if rows.device_mesh != self.ranks.flat_mesh or here.shape[-1] != self.stop - self.start:
                here = rows.full_tensor()[..., self.start : self.stop]
        else:
            here = rows[..., self.start : self.stop]
        return self.padded(here, self.width)

    def empty_whole(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.whole(torch.empty(*shape[:-1], self.width, dtype=dtype, device=device))

    @staticmethod
    def padded(rows: Tensor, width: int) -> Tensor:
        """Rows with zeros appended up to this length."""
        missing = width - rows.shape[-1]
        return torch.nn.functional.pad(rows, (0, missing)) if missing else rows

    def deal(
        self,
        rows: Tensor,  # [n, width]
    ) -> Tensor:  # [m, d]
        """From slices of n rows to whole rows, each on the ranks that evaluate it: m of them here."""
        ranks = self.ranks
        shares = ranks.shares(len(rows))
        blocks = rows.split(shares)
        mine = shares[ranks.place[0]]
        sent = [shares[proxy] for proxy, _ in ranks.places]
        outgoing = torch.cat([blocks[proxy] for proxy, _ in ranks.places])
        incoming = ranks.exchange(outgoing, sent, [mine] * ranks.size)
        slices = incoming.view(ranks.size, mine, self.width).transpose(0, 1)
        return slices.reshape(mine, ranks.size * self.width)[:, : self.dimension]

    def collect(
        self,
        rows: Tensor,  # [m, d], those evaluated here
        count: int,  # n
    ) -> Tensor:  # [n, width]
        """The inverse of ``deal``, from rows to slices; ranks along the data that share a row take the mean."""
        ranks = self.ranks
        shares = ranks.shares(count)
        slices = self.padded(rows, ranks.size * self.width).view(len(rows), ranks.size, self.width)
        outgoing = slices.transpose(0, 1).reshape(-1, self.width)
        received = [shares[proxy] for proxy, _ in ranks.places]
        incoming = ranks.exchange(outgoing, [len(rows)] * ranks.size, received)
        result = rows.new_zeros(count, self.width)
        blocks = result.split(shares)
        for (proxy, _), block in zip(ranks.places, incoming.split(received), strict=True):
            blocks[proxy].add_(block, alpha=1 / ranks.data)
        return result

    def gathered(
        self,
        row: Tensor,  # [width]
    ) -> Tensor:  # [d]
        """The whole vector, on every rank."""
        return torch.cat(self.ranks.gather_slices(row))[: self.dimension]


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter that falls into a slice."""

    index: int  # of the parameter, among those trained
    start: int  # within the parameter, flattened
    stop: int


class ShardedVector(ParameterVector):
    """This rank's slice of the parameters, held by *shadows*: a small parameter for each piece of one.

    The parameters themselves are for evaluating gradients. Between rounds they are *stale*, as ``gather`` left
    them last.

    Args:
        parameters: those that are trained, the same on all ranks.
        ranks: the processes that take part.

    Attributes:
        pieces: the parts of parameters that fall into this rank's slice.
        stale: whether the parameters lag behind the slices.
    """

    def __init__(self, parameters: Iterable[Tensor], ranks: Ranks) -> None:
        self._whole = ParameterVector(parameters)
        self._slices = ShardedSpace(self._whole.dimension, ranks)
        self.pieces: list[_Piece] = self._cut()
        super().__init__([self._shadow(piece) for piece in self.pieces])
        self.dimension: int = self._whole.dimension
        self.dtype: torch.dtype = self._whole.dtype
        self.device: torch.device = self._whole.device
        self.sizes.append(self._slices.width - sum(self.sizes))  # what pads the slice
        self.stale: bool = False
        self.note()

    def _cut(self) -> list[_Piece]:
        pieces, offset = [], 0
        for index, size in enumerate(self._whole.sizes):
            start = max(self._slices.start - offset, 0)
            stop = min(self._slices.stop - offset, size)
            if start < stop:
                pieces.append(_Piece(index, start, stop))
            offset += size
        return pieces

    def _shadow(self, piece: _Piece) -> Tensor:
        values = self._whole.parameters[piece.index].detach().reshape(-1)[piece.start : piece.stop]
        return values.clone().requires_grad_()

    @property
    def space(self) -> ShardedSpace:
        return self._slices

    @property
    def whole(self) -> ParameterVector:
        return self._whole

    def parts(self, vector: Tensor) -> list[Tensor]:
        return list(vector.split(self.sizes))[: len(self.parameters)]

    def flatten(self, pieces: Any) -> Tensor:
        # A slice may be padding alone: torch.cat needs a tensor at least.
        return self._slices.padded(super().flatten([torch.empty(0), *pieces]), self._slices.width)

    def write_gradients(self, vector: Tensor, mask: GradientMask) -> None:
        super().write_gradients(vector, tuple(mask[piece.index] for piece in self.pieces))

    def note(self) -> None:
        """Remember the parameters' versions, to notice when someone else changes them."""
        self._versions = [p._version for p in self._whole.parameters]

    @property
    def touched(self) -> bool:
        """Whether someone else changed the parameters."""
        return self._versions != [p._version for p in self._whole.parameters]

    def follow(self) -> None:
        """Take over a change that someone else made to the parameters.

        Raises:
            RuntimeError: they were stale when they were changed.
        """
        if not self.touched:
            return
        if self.stale:
            raise RuntimeError(
                "OptEx: parameters were changed between rounds, but they are split among ranks and were not "
                "whole; call optimizer.gather() before changing them"
            )
        self.pull()

    @torch.no_grad()
    def pull(self) -> None:
        """Take the slice's values from the parameters."""
        for shadow, piece in zip(self.parameters, self.pieces, strict=True):
            source = self._whole.parameters[piece.index].detach().reshape(-1)
            shadow.copy_(source[piece.start : piece.stop])
        self.stale = False
        self.note()

    def gather(self) -> None:
        """Write the whole vector into the parameters; every rank has to call it."""
        self.follow()
        if self.stale:
            self._whole.write(self._slices.gathered(self.read()))
            self.stale = False
            self.note()


class ShardedStepper(Stepper):
    """A stepper whose ranks step a slice each, with the same optimizer over its shadows.

    For optimizers that step every coordinate by itself. The base optimizer keeps its groups, settings and
    schedule, which are read before every step. Its state is kept for the slices; ``state_dict`` has it.

    Raises:
        TypeError: the base optimizer's class cannot be built from groups and its defaults.
    """

    vector: ShardedVector

    def __init__(self, base: Optimizer, vector: ShardedVector, scheduler: LRScheduler | None = None) -> None:
        self._owner = base
        self._trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
        super().__init__(_over_shadows(base, vector), vector, scheduler)
        self.mask: GradientMask = (True,) * len(vector.whole.parameters)
        base.state.clear()

    def mark(self, *, ahead: bool = True) -> None:
        self.vector.follow()
        self._hyperparameters = Hyperparameters(self._owner)
        super().mark()

    def take_back(self) -> None:
        super().take_back()
        self._hyperparameters.restore()

    def _step_base(self) -> None:
        for group, own in zip(self._base.param_groups, self._owner.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        self._base.step()
        # Without gradients this moves nothing; a scheduler asks whether the optimizer it ticks for has stepped.
        self.vector.whole.clear_gradients()
        self._owner.step()
        self.vector.stale = True

    def step_with_current_gradients(self) -> None:
        """One step with the parameters' ``.grad``, the same on every rank; they are whole afterwards."""
        gradient, mask = self.vector.whole.read_gradients()
        given = [p.grad for p in self.vector.whole.parameters]
        self.vector.write_gradients(self.vector.space.local(gradient), mask)
        self._step()
        for p, gradient in zip(self.vector.whole.parameters, given, strict=True):
            p.grad = gradient  # the caller's, as a plain step leaves them
        self.gather()

    def gather(self) -> None:
        self.vector.gather()

    def held(self) -> Callable[[], None]:
        put_back_slices, owner = super().held(), self._owner
        state, groups, stale = owner.state, owner.param_groups, self.vector.stale
        slices = [shadow.detach().clone() for shadow in self.vector.parameters]
        # Loading fills the slices' state in place.
        entries = {shadow: dict(values) for shadow, values in self._base.state.items()}

        def put_back() -> None:
            put_back_slices()
            owner.state, owner.param_groups = state, groups
            self._base.state.clear()
            self._base.state.update(entries)
            with torch.no_grad():
                for shadow, values in zip(self.vector.parameters, slices, strict=True):
                    shadow.copy_(values)
            self.vector.stale = stale

        return put_back

    # ------------------------------------------------------------------ the base optimizer's state

    def _local_vectors(self) -> dict[str, Tensor]:  # of [width]
        """The slice's state by name, each entry as one vector; zeros where a parameter has none."""
        vectors: dict[str, Tensor] = {}
        for k, (shadow, piece) in enumerate(zip(self.vector.parameters, self.vector.pieces, strict=True)):
            for name, value in self._base.state.get(shadow, {}).items():
                if _is_sliced(name, value, piece.stop - piece.start):
                    zeros = torch.zeros(self.vector.space.width, dtype=self.vector.dtype, device=value.device)
                    row = vectors.setdefault(name, zeros)
                    row.split(self.vector.sizes)[k].copy_(value)
        return vectors

    def _counters(self) -> list[dict[str, Any]]:
        """For each parameter its state but for vectors, and the names of the vectors."""
        here: dict[int, dict[str, Any]] = {}
        for shadow, piece in zip(self.vector.parameters, self.vector.pieces, strict=True):
            entries = self._base.state.get(shadow)
            if entries is not None:
                size = piece.stop - piece.start
                sliced = [name for name, value in entries.items() if _is_sliced(name, value, size)]
                rest = {name: copy.deepcopy(value) for name, value in entries.items() if name not in sliced}
                here[piece.index] = {"sliced": sliced, "rest": rest}
        merged: dict[int, dict[str, Any]] = {}
        for found in self.vector.space.ranks.gather_objects(here):
            merged.update(found)
        return [merged.get(index, {}) for index in range(len(self.vector.whole.parameters))]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state with its vectors along d, as tensors split among the ranks."""
        counters, vectors = self._counters(), self._local_vectors()
        names = sorted({name for entry in counters for name in entry.get("sliced", ())})
        nothing = torch.zeros(self.vector.space.width, dtype=self.vector.dtype, device=self.vector.device)
        return {
            "sliced": {name: self.vector.space.whole(vectors.get(name, nothing)) for name in names},
            "counters": counters,
            "param_groups": self._owner.state_dict()["param_groups"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "sliced" not in state:  # a whole optimizer's
            self._owner.load_state_dict(state)
            _move_state(self._owner, self._base, self.vector)
        else:
            self._owner.load_state_dict({"state": {}, "param_groups": state["param_groups"]})
            rows = {name: self.vector.space.local(row) for name, row in state["sliced"].items()}
            self._base.state.clear()
            for k, (shadow, piece) in enumerate(zip(self.vector.parameters, self.vector.pieces, strict=True)):
                entry = state["counters"][piece.index]
                if entry:
                    slices = {n: rows[n].split(self.vector.sizes)[k] for n in entry["sliced"]}
                    values = {n: row.to(shadow, copy=True).detach() for n, row in slices.items()}
                    self._base.state[shadow].update(values | copy.deepcopy(entry["rest"]))
        self._owner.state.clear()
        if self.vector.touched:  # the model's state was loaded before
            self.vector.pull()

    def move_to(self, point: Tensor) -> None:
        self.vector.write(point)
        self.vector.stale = True
        self.gather()

    def release(self) -> None:
        self.gather()
        state = self.state_dict()
        whole = {name: cast(Any, row).full_tensor() for name, row in state["sliced"].items()}
        self._owner.load_state_dict(joined_state(state | {"sliced": whole}, self._owner, self._trained))


def joined_state(
    state: dict[str, Any],
    base: Optimizer,
    trained: list[Tensor],
) -> dict[str, Any]:
    """The base optimizer's own state dict, from a sharded one whose vectors [d] are whole.

    Args:
        state: as ``ShardedStepper.state_dict`` answers, with whole vectors.
        base: whose groups number the parameters.
        trained: the parameters, in the order of the vectors.
    """
    params = [p for group in base.param_groups for p in group["params"]]
    result: dict[int, dict[str, Any]] = {}
    offset = 0
    for p, entry in zip(trained, state["counters"], strict=True):
        if entry:
            values = {
                name: state["sliced"][name][offset : offset + p.numel()].view(p.shape).to(p, copy=True)
                for name in entry["sliced"]
            }
            position = next((i for i, q in enumerate(params) if q is p), None)
            if position is not None:  # it may have been taken out of the groups
                result[position] = values | copy.deepcopy(entry["rest"])
        offset += p.numel()
    return {"state": result, "param_groups": state["param_groups"]}


def _over_shadows(base: Optimizer, vector: ShardedVector) -> Optimizer:
    """An optimizer of the same class and settings over the shadows.

    Raises:
        TypeError: the class cannot be built from groups and its defaults.
    """
    number = {id(p): index for index, p in enumerate(vector.whole.parameters)}
    shadows: dict[int, list[Tensor]] = defaultdict(list)
    for shadow, piece in zip(vector.parameters, vector.pieces, strict=True):
        shadows[piece.index].append(shadow)
    groups = [
        {**group, "params": [s for p in group["params"] if id(p) in number for s in shadows[number[id(p)]]]}
        for group in base.param_groups
    ]
    accepted = inspect.signature(type(base)).parameters
    settings = {name: value for name, value in base.defaults.items() if name in accepted}
    try:
        twin = type(base)(groups, **settings)
    except TypeError as error:
        raise TypeError(
            f"OptEx: {type(base).__name__} cannot be built anew over slices of the parameters ({error}); pass "
            "shard=False"
        ) from error
    _move_state(base, twin, vector)
    return twin


def _move_state(base: Optimizer, twin: Optimizer, vector: ShardedVector) -> None:
    twin.state.clear()
    for shadow, piece in zip(vector.parameters, vector.pieces, strict=True):
        p = vector.whole.parameters[piece.index]
        for name, value in base.state.get(p, {}).items():
            if _is_sliced(name, value, p.numel()):
                value = value.detach().reshape(-1)[piece.start : piece.stop].clone()
            else:
                value = copy.deepcopy(value)
            twin.state[shadow][name] = value


def _is_sliced(name: str, value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.numel() == size and name not in COUNTERS
