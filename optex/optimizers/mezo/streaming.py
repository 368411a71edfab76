"""ZO2: MeZO for models that do not fit on the device; blocks are uploaded in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optex.checks import check_device, check_kind, check_number, shown
from optex.draws import generator_states, set_generator_states
from optex.functional import called_with
from optex.optimizers.mezo.directions import (
    check_seed,
    direction,
    finite_loss,
    update_,
)
from optex.optimizers.mezo.storage import open_store

__all__ = ["BlockStreamer", "Traffic"]

_REMEDY = "no block was stepped along this direction. Check the batch, or lower the rate or epsilon"


@dataclass
class Traffic:
    """What was copied to and from the device.

    Attributes:
        uploads, offloads: how often each block was copied to the device, and back.
        resident, peak_resident: blocks on the device now, and at most so far.
        bytes_moved: in both directions together.
    """

    uploads: list[int] = field(default_factory=list)
    offloads: list[int] = field(default_factory=list)
    resident: int = 0
    peak_resident: int = 0
    bytes_moved: int = 0


class BlockStreamer:
    """MeZO's steps on a chain of blocks that are kept in main memory or on disk, and visit the device in turn.

    The iterates are MeZO's (``MeZO(exact=True)`` of the same parameters and seeds, to the bit in full
    precision); the order of work differs. Both shifted passes advance together, block by block. The scalar of a
    step is known only after its last block, so a block gets that step's update at its next visit, before it is
    shifted: it is uploaded once a step. The updated block is copied back **before** it is shifted, and the
    shifted values are dropped: nothing drifts, and a step that fails has changed nothing. On CUDA a block's
    upload, update and return run on a stream of their own while the block before it computes.

    From here on the blocks' parameters are those in the store. ``flush()`` brings them up to date; after that
    the model can be saved or used as ever. Call it before the streamer is dropped.

    Args:
        blocks: modules that are applied one after the other, ``nn.Sequential`` or a list; for a Hugging Face
            model ``language_model_blocks(model)``. They may not share parameters.
        device: the one that computes.
        store: ``"cpu"``, or a new folder for files mapped into memory.
        lr: as of MeZO; may be set between steps.
        epsilon: ε, the distance at which the loss is probed, positive.
        weight_decay: not negative.
        transfer_dtype: of what is stored and copied, ``torch.bfloat16`` say, for half the memory and traffic;
            the device computes in the blocks' own dtype. Updates are then rounded to this dtype: in bfloat16
            those below 1/256 of a weight are mostly lost.

    Attributes:
        blocks: as a list.
        device, lr, epsilon, weight_decay: as given.
        log: for every step its seed, scalar and rate, as ``MeZO.log``.
        traffic: what was copied to and from the device.

    Raises:
        ValueError: there are no blocks or parameters, or two blocks share a parameter, which the message names.
        TypeError: a parameter is complex, or a block no module.
        FileExistsError: the store is a folder that is not empty.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> blocks = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))
    >>> x, y = torch.randn(32, 4), torch.randn(32, 4)
    >>> streamer = optex.optimizers.BlockStreamer(blocks, lr=0.02)
    >>> losses = [streamer.step(x, lambda out: (out - y).square().mean()) for _ in range(100)]
    >>> streamer.flush()
    >>> bool(losses[-1] < losses[0]), streamer.traffic.peak_resident
    (True, 2)

    Source: Wang et al., arXiv 2503.12668, with MeZO's Algorithm 1.
    """

    def __init__(
        self,
        blocks: nn.Sequential | nn.ModuleList | Sequence[nn.Module],
        *,
        device: torch.device | str = "cpu",
        store: str | Path = "cpu",
        lr: float = 1e-6,
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
        transfer_dtype: torch.dtype | None = None,
    ) -> None:
        self.lr: float = check_number("BlockStreamer", "lr", lr)
        self.epsilon: float = check_number("BlockStreamer", "epsilon", epsilon, open_below=True)
        self.weight_decay: float = check_number("BlockStreamer", "weight_decay", weight_decay)
        check_kind("BlockStreamer", "transfer_dtype", transfer_dtype, torch.dtype, "a floating dtype or None")
        if transfer_dtype is not None and not transfer_dtype.is_floating_point:
            raise TypeError(
                f"BlockStreamer: transfer_dtype must be a floating dtype, got {shown(transfer_dtype)}"
            )
        self.device: torch.device = check_device("BlockStreamer", "device", device)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList, Sequence)):
            raise TypeError(f"BlockStreamer: blocks must be a list of modules, got {type(blocks).__name__}")
        self.blocks: list[nn.Module] = list(blocks)
        _check_blocks(self.blocks)
        self.log: list[tuple[int, list[float], list[float]]] = []
        self.traffic: Traffic = Traffic([0] * len(self.blocks), [0] * len(self.blocks))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._waiting: list[list[_Waiting]] = []
        self._take_over(store, transfer_dtype)

    def step(self, inputs: Any, loss: Callable[[Any], Any], *, seed: int | None = None) -> Tensor:  # []
        """One step: every block visits once; its update follows at its next visit, or at ``flush``.

        Args:
            inputs: of the first block; a tensor, or tuples, lists and dicts of them.
            loss: ``loss(output)`` of the last block's output returns a scalar; called twice.
            seed: of the step; None draws it from torch's global generator.

        Returns:
            The mean of the two losses, float64, CPU.

        Raises:
            NonFiniteError: a loss is NaN or infinite; parameters are those of before this step, and so are
                torch's generators.
        """
        rate = check_number("BlockStreamer", "lr", self.lr)
        before = generator_states()
        try:
            seed = check_seed("BlockStreamer", seed)
            with torch.no_grad():
                ends = self._pass([self._placed(inputs), self._placed(inputs, copy=True)], seed)
                draws, values = generator_states(), []
                for end, name in zip(ends, ("ahead", "behind"), strict=True):
                    set_generator_states(draws)
                    values.append(
                        finite_loss("BlockStreamer", loss(end), f"{name} along the direction", _REMEDY)
                    )
        except BaseException:
            set_generator_states(before)
            raise
        self.log.append((seed, [(values[0] - values[1]) / (2 * self.epsilon)], [rate]))
        return torch.tensor(values, dtype=torch.float64).mean()

    def forward(self, inputs: Any) -> Any:
        """The last block's output at the parameters after all steps; blocks visit the device in turn."""
        with torch.no_grad():
            return self._pass([self._placed(inputs)], None)[0]

    def flush(self) -> None:
        """Bring every block up to date: apply the last step's update where it is missing."""
        with torch.no_grad():
            for number, waiting in enumerate(self._waiting):
                if any(w.behind(len(self.log)) for w in waiting):
                    visit = self._fetch(number)
                    self._leave(visit)
        if self._stream is not None:
            self._stream.synchronize()

    def _take_over(self, where: str | Path, transfer_dtype: torch.dtype | None) -> None:
        store, place = open_store(where, self.device), 0
        for number, block in enumerate(self.blocks):
            waiting = []
            for name, p in block.named_parameters():
                narrow = transfer_dtype if transfer_dtype is not None and p.is_floating_point() else p.dtype
                kept = store.keep(f"{number:04d}-{name}", p.detach().to(narrow))
                waiting.append(_Waiting(name, place, kept, p.dtype, p.requires_grad))
                p.data = kept
                place += 1
            for owner in block.modules():  # masks and the like are small: they stay on the device
                for name, buffer in list(owner._buffers.items()):
                    if buffer is not None:
                        owner._buffers[name] = buffer.to(self.device)
            self._waiting.append(waiting)

    def _pass(self, states: list[Any], seed: int | None) -> list[Any]:
        """All states through all blocks, side by side; the next block is uploaded while one computes."""
        done: list[Any] = []
        here, last = self._fetch(0), len(self.blocks) - 1
        for number in range(len(self.blocks)):
            ahead = None
            try:
                if number < last:
                    if len(done) > 1:
                        done[-2].synchronize()  # otherwise uploads run ahead of the device, and fill it
                    ahead = self._fetch(number + 1)
                states = self._advance(here, states, seed)
            except BaseException:
                if ahead is not None:
                    self._leave(ahead)
                raise
            finally:
                self._leave(here)
            if self._stream is not None:
                done.append(torch.cuda.current_stream(self.device).record_event())
            if ahead is not None:
                here = ahead
        return states

    def _advance(self, visit: _Visit, states: list[Any], seed: int | None) -> list[Any]:
        """Each state through a block: as it is, or at +ε and -ε along the step's direction."""
        block, draws, ends = self.blocks[visit.number], generator_states(), []
        if visit.arrived is not None:
            visit.arrived.wait(torch.cuda.current_stream(self.device))
        for state, shift in zip(states, (1.0, -2.0), strict=False):
            set_generator_states(draws)
            if seed is not None:
                for w in self._waiting[visit.number]:
                    if w.trained:
                        p = visit.tensors[w.name]
                        p.add_(direction(seed, 0, w.place, p), alpha=shift * self.epsilon)
            ends.append(called_with(block, visit.tensors, state))
        return ends

    def _fetch(self, number: int) -> _Visit:
        """Upload a block, apply the steps that it lacks, and copy what changed back."""
        traffic, waiting = self.traffic, self._waiting[number]
        visit = _Visit(number, {})
        returned = False
        with self._beside():
            for w in waiting:
                here = w.kept.to(self.device, non_blocking=True, copy=True)
                p = visit.tensors[w.name] = here.to(w.dtype)
                traffic.bytes_moved += w.kept.nbytes
                if not w.behind(len(self.log)):
                    continue
                for seed, scalars, rates in self.log[w.steps :]:
                    update_(p, w.place, seed, scalars, rates[0], self.weight_decay)
                narrow = p.to(w.kept.dtype)
                w.kept.copy_(narrow, non_blocking=True)
                if narrow is not p:
                    p.copy_(narrow)  # the point that is probed is the one in the store
                w.steps, returned = len(self.log), True
                traffic.bytes_moved += w.kept.nbytes
            if self._stream is not None:
                visit.arrived = self._stream.record_event()
        traffic.uploads[number] += 1
        traffic.offloads[number] += returned
        traffic.resident += 1
        traffic.peak_resident = max(traffic.peak_resident, traffic.resident)
        return visit

    def _leave(self, visit: _Visit) -> None:
        if self._stream is not None:
            for tensor in visit.tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        visit.tensors.clear()
        self.traffic.resident -= 1

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _placed(self, value: Any, *, copy: bool = False) -> Any:
        """On the device; a copy for the second pass, as a block may change what it gets in place."""
        if isinstance(value, Tensor):
            return value.to(self.device, copy=copy)
        if isinstance(value, (tuple, list)):
            parts = [self._placed(part, copy=copy) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: self._placed(part, copy=copy) for key, part in value.items()}
        return value


@dataclass
class _Waiting:
    """A parameter in the store, and how many of the log's steps it has had."""

    name: str
    place: int
    kept: Tensor  # [...], CPU
    dtype: torch.dtype
    trained: bool
    steps: int = 0

    def behind(self, taken: int) -> bool:
        return self.trained and self.steps < taken


@dataclass
class _Visit:
    """A block's tensors on the device."""

    number: int
    tensors: dict[str, Tensor]
    arrived: Any = None  # torch.cuda.Event


def _check_blocks(blocks: Sequence[nn.Module]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    trained = 0
    for number, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"BlockStreamer: block {number} must be a torch.nn.Module, got {type(block).__name__}"
            )
        for name, p in block.named_parameters():
            if p.is_complex():
                raise TypeError(
                    f"BlockStreamer: {name!r} of block {number} is complex; use torch.view_as_real(parameter)"
                )
            trained += p.numel() if p.requires_grad else 0
            storage = p.untyped_storage().data_ptr()
            other, other_name = owners.setdefault(storage, (number, name)) if p.numel() else (number, name)
            if other != number:
                raise ValueError(
                    f"BlockStreamer: {other_name!r} of block {other} and {name!r} of block {number} are tied, "
                    "and tied weights cannot come and go with two blocks. Untie them (a copy for one), or put "
                    "both layers into one block"
                )
    if not trained:
        raise ValueError("BlockStreamer: no block has a parameter that requires a gradient")
