"""A base optimizer's steps on flat vectors, however many parameters there are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from optex.stepping.bases import COUNTERS, ELEMENTWISE
from optex.stepping.linear import LinearRule, linear_rule
from optex.stepping.parameters import ParameterVector
from optex.stepping.snapshot import TORCHS_OWN, Settings
from optex.stepping.stepper import Stepper

__all__ = ["FlatStepper"]

# Numbers that a CPU thread steps at a time: a step reads them a dozen times, and they stay in the cache.
_LONGEST: Final = 1 << 17


class FlatStepper(Stepper):
    """A stepper that walks on flat copies: nothing is allocated and no loop runs over the parameters.

    From the mark on, an optimizer of the same class and settings steps one flat tensor a group (on CPUs in
    pieces that fit into caches, if it is long). The base optimizer's own parameters and state stay at the mark
    until ``settle`` hands the result over; settings and schedule are the base optimizer's all along. Everything
    is read anew at every mark, so that edits and loads in between count.

    That takes a class that steps every coordinate by itself (``ELEMENTWISE``), with gradients for all
    parameters, without step hooks or a step of its user's making, and plain tensors in one dtype on one
    device with the same counters throughout a group. The conditions are checked at every mark; where one does
    not hold, the plain stepper's steps are taken up to the next mark. On CPUs results were equal to the plain
    stepper's bit for bit wherever that was tried; kernels need not round alike in shorter and longer tensors.

    Memory: twice the parameters and the base optimizer's state.
    """

    taken: int

    def __init__(self, base: Optimizer, vector: ParameterVector, scheduler: LRScheduler | None = None) -> None:
        self._flat: _FlatBase | None = None
        self._is_ahead = False  # steps are taken on the flat vectors, and the base optimizer is at the mark
        super().__init__(base, vector, scheduler)

    def mark(self, *, ahead: bool = True) -> None:
        self.settle()
        self._is_ahead = False
        if not ahead:
            super().mark()
            return
        if not (all(self.mask) and _can_be_flat(self._base, self.vector)):
            self._flat = None
            super().mark()
            return
        if self._flat is None or not self._flat.fits():
            self._flat = _FlatBase(self._base, self.vector)
        if not self._flat.note():
            super().mark()
            return
        self._start = _FlatStart(self._flat, Settings(self._base, self._scheduler))
        self.taken = 0
        self._is_ahead = True

    def rewind(self) -> None:
        start = self._start
        if not isinstance(start, _FlatStart):
            super().rewind()
            return
        if self._is_ahead:  # nothing has touched the base optimizer but its schedule
            start.settings.restore()
        else:
            start.restore()
        start.flat.rewind()
        self._is_ahead, self.taken = True, 0
        start.check()

    def take_back(self) -> None:
        self._is_ahead = False
        super().take_back()

    def step(self, gradient: Tensor) -> None:
        if self._flat is None or not self._is_ahead or not all(self.mask):
            super().step(gradient)
            return
        self._flat.step(gradient)
        # A scheduler asks whether the optimizer it ticks for has stepped.
        vars(self._base)["_opt_called"] = True
        self._tick()

    def linear_rule(self) -> LinearRule | None:
        if not self._is_ahead or self.taken or self._scheduler is not None:
            return None
        return linear_rule(self._base, self.vector)

    def arrive(self, point: Tensor, gradient: Tensor, state: Mapping[str, Tensor], taken: int) -> None:
        self._is_ahead = False  # the base optimizer goes there itself
        super().arrive(point, gradient, state, taken)

    def _step_base(self) -> None:
        self._hand_over()
        super()._step_base()

    def settle(self) -> None:
        if self._flat is not None and self._is_ahead and self.taken:
            self.vector.write_gradients(self._flat.gradient, self.mask)  # as a plain step leaves them
        self._hand_over()

    def _hand_over(self) -> None:
        if self._flat is not None and self._is_ahead:
            self._is_ahead = False  # first: from here on the base optimizer is no longer at the mark
            if self.taken:
                self._flat.hand_over()

    @property
    def point(self) -> Tensor:
        if self._flat is not None and self._is_ahead and self.taken:
            return self._flat.point.clone()
        return self.vector.read()

    def move_to(self, point: Tensor) -> None:
        self.settle()
        super().move_to(point)

    def release(self) -> None:
        self.settle()

    def state_dict(self) -> dict[str, Any]:
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.settle()
        super().load_state_dict(state)

    def held(self) -> Any:
        self.settle()
        return super().held()


def _can_be_flat(base: Optimizer, vector: ParameterVector) -> bool:
    """Whether one tensor can stand for each group's parameters, as far as anything but their state decides."""
    hooks = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks
    hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    if type(base) not in ELEMENTWISE or hooks or not vars(base).keys() <= TORCHS_OWN:
        return False
    step = vars(base).get("step")  # a scheduler's wrapper only notes that it was called
    if step is not None and not (
        hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is type(base).step
    ):
        return False
    if any(group.get("fused") or group.get("differentiable") for group in base.param_groups):
        return False  # fused ones go over all parameters at once already
    parameters = [p for group in base.param_groups for p in group["params"]]
    if any(not p.requires_grad and p.grad is not None for p in parameters):
        return False  # torch steps those, too
    trained = [p for p in parameters if p.requires_grad]
    return (
        _are_same(trained, vector.parameters)
        and len(set(map(id, trained))) == len(trained)
        and all(_is_plain(p, vector) for p in trained)
    )


def _is_plain(p: Tensor, vector: ParameterVector) -> bool:
    kind = p.dtype == vector.dtype and p.device == vector.device and p.layout is torch.strided
    return kind and type(p) in (Tensor, torch.nn.Parameter) and p.is_contiguous()


def _are_same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    return len(these) == len(those) and all(p is q for p, q in zip(these, those, strict=True))


class _FlatStart:
    """The mark, with what brings the base optimizer back to it."""

    def __init__(self, flat: _FlatBase, settings: Settings) -> None:
        self.flat = flat
        self.settings = settings

    def check(self) -> None:
        """Refuse steps since then that could not be taken back; as ``Snapshot.check``."""
        self.settings.check()

    def restore(self) -> None:
        """Bring the base optimizer and its parameters back to the mark; may be called again."""
        self.settings.restore()
        self.flat.restore()


class _FlatBase:
    """An optimizer like the base over flat tensors, and what it starts from.

    Attributes:
        point: [d], the parameters, as walked ahead; the groups' tensors are slices of it.
        gradient: [d], a copy of the last step's: some optimizers change the gradient that they step with.
    """

    def __init__(self, base: Optimizer, vector: ParameterVector) -> None:
        self._base, self._vector = base, vector
        self.point, self.gradient, start = (
            torch.zeros(vector.dimension, dtype=vector.dtype, device=vector.device) for _ in range(3)
        )
        self._start, self._walked = (_Row(row, vector.parameters) for row in (start, self.point))
        self._groups: list[_FlatGroup] = []
        longest = _LONGEST * torch.get_num_threads() if vector.device.type == "cpu" else vector.dimension
        offset = 0
        for group in base.param_groups:
            parameters = [p for p in group["params"] if p.requires_grad]
            end = offset + sum(p.numel() for p in parameters)
            tensors = list(self.point[offset:end].split(longest)) if parameters else []
            for tensor, gradient in zip(tensors, self.gradient[offset:end].split(longest), strict=False):
                tensor.requires_grad_().grad = gradient
            self._groups.append(_FlatGroup(parameters, tensors))
            offset = end
        accepted = inspect.signature(type(base)).parameters
        settings = {name: value for name, value in base.defaults.items() if name in accepted}
        groups = [{"params": group.tensors} for group in self._groups]
        self._twin = type(base)(groups, **settings)

    def fits(self) -> bool:
        """Whether the base optimizer's groups still are those that this was made for."""
        groups = [[p for p in group["params"] if p.requires_grad] for group in self._base.param_groups]
        return len(groups) == len(self._groups) and all(
            _are_same(parameters, own.parameters) for parameters, own in zip(groups, self._groups, strict=True)
        )

    @torch.no_grad()
    def note(self) -> bool:
        """Start from where the base optimizer is; False where its state cannot be joined."""
        if not all(group.note(self._base.state) for group in self._groups if group.parameters):
            return False
        torch._foreach_copy_(self._start.pieces, self._vector.parameters)
        self.rewind()
        return True

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the start; the base optimizer is left as it is."""
        self.point.copy_(self._start.vector)
        for group in self._groups:
            group.rewind(self._twin.state)

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the base optimizer's parameters and state back to the start."""
        torch._foreach_copy_(self._vector.parameters, self._start.pieces)
        for group in self._groups:
            group.restore(self._base.state)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the base optimizer parameters and state as they are now."""
        torch._foreach_copy_(self._vector.parameters, self._walked.pieces)
        for group in self._groups:
            group.hand_over(self._twin.state, self._base.state)

    def step(
        self,
        gradient: Tensor,  # [d]
    ) -> None:
        """One step with the base optimizer's present settings."""
        for group, own in zip(self._twin.param_groups, self._base.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key not in ("params", "param_names")})
        self.gradient.copy_(gradient)
        self._twin.step()


class _Row:
    """A vector of all parameters, one after the other, and its pieces in their shapes."""

    def __init__(self, vector: Tensor, parameters: Sequence[Tensor]) -> None:
        self.vector = vector
        parts = vector.split([p.numel() for p in parameters])
        self.pieces = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


class _FlatGroup:
    """The trained parameters of a group, and the tensors that stand for them.

    Attributes:
        parameters: the base optimizer's.
        tensors: their values one after the other; one tensor, or several where it would be a long one.
    """

    def __init__(self, parameters: list[Tensor], tensors: list[Tensor]) -> None:
        self.parameters, self.tensors = parameters, tensors
        self._lengths = [tensor.numel() for tensor in tensors]
        self._start: dict[str, Tensor | _Row] = {}  # state by name: joined rows; of counters one for all
        self._rows: dict[str, tuple[_Row, _Row]] = {}  # memory for the start, and for walking on from it
        self._known: list[bool] = []  # which parameters had an entry in the state

    def note(self, state: dict[Tensor, Any]) -> bool:
        """Read the parameters' state; False where it cannot be joined."""
        columns = _columns([state.get(p, {}) for p in self.parameters], self.parameters)
        if columns is None:
            return False
        start: dict[str, Tensor | _Row] = {}
        for name, values in columns.items():
            if name in COUNTERS:
                start[name] = values[0].clone()
            else:
                start[name] = self._memory(name)[0]
                torch._foreach_copy_(self._memory(name)[0].pieces, values)
        self._start, self._known = start, [p in state for p in self.parameters]
        return True

    def _memory(self, name: str) -> tuple[_Row, _Row]:
        if name not in self._rows:
            like, length = self.tensors[0], sum(self._lengths)
            start, walked = (_Row(like.new_empty(length), self.parameters) for _ in range(2))
            self._rows[name] = start, walked
        return self._rows[name]

    def rewind(self, state: dict[Tensor, Any]) -> None:
        """Set the flat optimizer's state from what was read."""
        entries: list[dict[str, Tensor]] = [{} for _ in self.tensors]
        for name, value in self._start.items():
            if isinstance(value, Tensor):
                pieces = [value.clone() for _ in self.tensors]
            else:
                pieces = self._memory(name)[1].vector.copy_(value.vector).split(self._lengths)
            for entry, piece in zip(entries, pieces, strict=True):
                entry[name] = piece
        for tensor, entry in zip(self.tensors, entries, strict=True):
            state.pop(tensor, None)
            if entry:
                state[tensor] = entry

    def restore(self, state: dict[Tensor, Any]) -> None:
        """Set the parameters' state from what was read."""
        for p, known in zip(self.parameters, self._known, strict=True):
            if not known:
                state.pop(p, None)
            for name in [name for name in state.get(p, {}) if name not in self._start]:
                del state[p][name]
        self._give(state, self._start)

    def hand_over(self, source: dict[Tensor, Any], state: dict[Tensor, Any]) -> None:
        """Set the parameters' state from the flat optimizer's."""
        entries = [source.get(tensor, {}) for tensor in self.tensors]
        names = entries[0] if entries else ()
        self._give(state, {name: self._joined(name, [entry[name] for entry in entries]) for name in names})

    def _joined(self, name: str, pieces: list[Any]) -> Any:
        if name in COUNTERS or not isinstance(pieces[0], Tensor):
            return pieces[0]
        walked = self._memory(name)[1]
        if pieces[0].data_ptr() == walked.vector.data_ptr():
            return walked  # stepped in place, as they all do but for making their state
        return _Row(torch.cat(pieces), self.parameters)

    def _give(self, state: dict[Tensor, Any], joined: Mapping[str, Any]) -> None:
        for name, value in joined.items():
            pieces = value.pieces if isinstance(value, _Row) else [value] * len(self.parameters)
            entries = [state[p] for p in self.parameters]
            known = [entry.get(name) for entry in entries]
            if all(
                isinstance(there, Tensor) and there.shape == piece.shape
                for there, piece in zip(known, pieces, strict=True)
            ):
                torch._foreach_copy_(known, pieces)
                continue
            for entry, piece in zip(entries, pieces, strict=True):
                entry[name] = piece.clone() if isinstance(piece, Tensor) else copy.deepcopy(piece)


def _columns(entries: list[Any], parameters: list[Tensor]) -> dict[str, list[Tensor]] | None:
    """The parameters' state by name; None where one tensor cannot stand for them."""
    if not all(isinstance(entry, dict) and entry.keys() == entries[0].keys() for entry in entries):
        return None
    columns = {name: [entry[name] for entry in entries] for name in entries[0]}
    for name, values in columns.items():
        if not all(isinstance(value, Tensor) for value in values):
            return None
        if name in COUNTERS:
            if not _are_equal(values):
                return None
        elif not all(_is_like(value, p) for value, p in zip(values, parameters, strict=True)):
            return None
    return columns


def _is_like(value: Tensor, p: Tensor) -> bool:
    kind = value.dtype == p.dtype and value.device == p.device
    return kind and value.shape == p.shape and value.is_contiguous()


def _are_equal(values: list[Tensor]) -> bool:
    first = values[0]
    if not all(v.shape == first.shape and v.dtype == first.dtype and v.device == first.device for v in values):
        return False
    stacked = torch.stack(values)
    return first.numel() == 1 and bool((stacked == first).all())
