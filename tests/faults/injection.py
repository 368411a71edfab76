"""Runs that are interrupted, starved of memory or fed broken states, and what must be true of them then."""

import copy
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

import optex
from optex import OptEx, WithinTolerance
from tests.models import assert_equal_trees, regression_batches

PACKAGE = str(Path(optex.__file__).parent)
BATCHES = 12


class Net(nn.Module):
    """BatchNorm and dropout: buffers and draws that have to come back, too."""

    def __init__(self, dropout=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 3))
        self.double()

    def forward(self, batch):
        return (self.layers(batch[0]) - batch[1]).square().mean()


class Plain(nn.Module):
    """For workers, which take no buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, batch):
        return (self.layers(batch[0]) - batch[1]).square().mean()


class Run:
    """A run under way: everything that has to stay whole, in one copyable thing."""

    def __init__(self, tolerance=0.0, model=None, evaluator=None):
        self.model = Net() if model is None else model
        base = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.scheduler = LambdaLR(base, decay)
        self.optimizer = OptEx(
            base,
            parallelism=3,
            history_size=5,
            acceptance=WithinTolerance(tolerance),
            scheduler=self.scheduler,
            evaluator=evaluator,
        )
        self.batches = Batches()
        self.ahead: dict[str, Any] = {}  # a state dict that an action may load
        torch.manual_seed(1)
        self.generator = torch.get_rng_state()

    def round(self):
        """One round, on the global generator as this run left it."""
        torch.set_rng_state(self.generator)
        try:
            return next(self.optimizer.rounds(self.batches, self.model), None)
        finally:
            self.generator = torch.get_rng_state()

    def finish(self):
        while self.round() is not None:
            pass
        return self

    def state(self):
        """All that a round or a load may change."""
        torch.set_rng_state(self.generator)
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})


class Batches:
    """An iterator that can be copied where it stands."""

    def __init__(self):
        self.items, self.position = regression_batches(BATCHES), 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == len(self.items):
            raise StopIteration
        self.position += 1
        return self.items[self.position - 1]


def decay(step):
    return 0.95**step


def plain_end(model):
    """The plain loop over the same batches and draws: the state dict at its end."""
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = LambdaLR(base, decay)
    torch.manual_seed(1)
    for batch in regression_batches(BATCHES):
        base.zero_grad()
        model(batch).backward()
        base.step()
        scheduler.step()
    return model.state_dict()


def without_plans(state):
    """A state but for the batches that were drawn and planned, which may be ahead of the round's start."""
    own = {k: v for k, v in state["optimizer"]["optex"].items() if k not in ("window", "batches_drawn")}
    return {"model": state["model"], "optimizer": {**state["optimizer"], "optex": own}}


def assert_start_or_end(run, start, end):
    """The state is that of the round's start, or of its end; which one."""
    found = run.state()
    try:
        assert_equal_trees(found, end)
    except AssertionError:
        assert_equal_trees(without_plans(found), without_plans(start))
        return "start"
    return "end"


# ---------------------------------------------------------------- faults


class Lines:
    """Counts the lines of the package that an action runs, and interrupts it at one of them."""

    def __init__(self, at=None):
        self.at, self.count, self.where = at, 0, None

    def _enter(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

    def run(self, action):
        """Whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


# These set a flag: there is no memory that they could lack.
NO_MEMORY = {torch._C._set_grad_enabled, torch.set_grad_enabled, torch.is_grad_enabled}


class Operations(TorchFunctionMode):
    """Counts torch's operations, and lets memory run out at one of them."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count, self.where = at, 0, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in NO_MEMORY:
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count == self.at:
            self.where = getattr(func, "__name__", str(func))
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))

    def run(self, action):
        try:
            with self:
                action()
        except torch.OutOfMemoryError:
            return True
        return False


def sweep(fault, prepared, action, places, expected_end):
    """Break an action at each of these places, look at the state, go on, and look at the end.

    Args:
        fault: ``Lines`` or ``Operations``.
        prepared: the run before the action.
        action: takes a copy of it one step further.
        places: which line or operation to break at, each a number.
        expected_end: the model's state when all batches are used up; None where it need not be one.

    Returns:
        How many broke, and how often the state was the start's and the end's.
    """
    start, whole = prepared.state(), copy.deepcopy(prepared)
    action(whole)
    end, found = whole.state(), {"start": 0, "end": 0}
    for place in places:
        run, injected = copy.deepcopy(prepared), fault(place)
        if not injected.run(partial(action, run)):
            continue
        try:
            found[assert_start_or_end(run, start, end)] += 1
            if expected_end is not None:
                assert_equal_trees(run.finish().model.state_dict(), expected_end)
        except AssertionError as error:
            error.add_note(f"broken at {fault.__name__} {place}: {injected.where}")
            raise
    return found


def count(fault, prepared, action):
    """How many places there are to break an action at, once torch has filled its own caches."""
    prepared.state()  # as sweep does: what is computed on demand is then up to date
    found = []
    for _ in range(2):
        counting, run = fault(), copy.deepcopy(prepared)
        counting.run(partial(action, run))
        found.append(counting.count)
    return min(found)


# ---------------------------------------------------------------- broken states

LEAVES = (None, "text", -1, 7, 2.5, float("nan"), True, [], {}, torch.ones(3), torch.tensor(float("nan")))


def paths(state, path=()):
    """Every place in nested containers, but for the content of batches and the layers above our own."""
    yield path
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return
    for key, value in items:
        inside = (*path, key)
        if len(inside) == 4 and inside[:2] == ("optex", "window") and inside[3] == 0:
            continue  # a batch is the user's
        yield from paths(value, inside)


def mutate(state, generator):
    """A state dict with one thing wrong; what was done."""
    state = copy.deepcopy(state)
    places = [path for path in paths(state) if path]
    path = places[int(torch.randint(len(places), (1,), generator=generator))]
    parents = list(itertools.accumulate(path[:-1], lambda node, key: node[key], initial=state))
    value = parents[-1][path[-1]]
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 0 and isinstance(parents[-1], dict):
        del parents[-1][path[-1]]
        return state, f"{path} deleted"
    new = _broken(value, kind, generator)
    _put(state, path, new)
    return state, f"{path}: {str(value)[:30]} -> {str(new)[:30]}"


def _broken(value, kind, generator):
    if isinstance(value, torch.Tensor) and value.numel() and kind < 3:
        if kind == 1:
            return value.reshape(-1)[: value.numel() // 2].clone()
        if value.is_floating_point():
            broken = value.clone()
            broken.view(-1)[int(torch.randint(value.numel(), (1,), generator=generator))] = float("nan")
            return broken
        return value.to(torch.float32)
    if isinstance(value, (list, tuple)) and value and kind == 1:
        return value[:-1]
    return LEAVES[int(torch.randint(len(LEAVES), (1,), generator=generator))]


def _put(state, path, value):
    """Set what is at the path, through tuples as well."""
    node = state
    for key in path[:-1]:
        if isinstance(node[key], tuple):
            node[key] = list(node[key])
        node = node[key]
    node[path[-1]] = value


def load_mutated(run, state, seed):
    """Load a state with one thing wrong: ``"refused"`` and all untouched, or ``"accepted"`` and running."""
    broken, what = mutate(state, torch.Generator().manual_seed(seed))
    before = run.state()
    try:
        run.optimizer.load_state_dict(broken)
    except (ValueError, TypeError) as refusal:
        try:
            assert_equal_trees(run.state(), before)
        except AssertionError as error:
            error.add_note(f"not untouched after {what}: {refusal}")
            raise
        return "refused"
    except Exception as error:
        error.add_note(f"not refused by name: {what}")
        raise
    run.generator = torch.get_rng_state()
    try:
        for _ in range(2):
            run.round()
    except Exception as error:
        error.add_note(f"accepted, and failing later: {what}")
        raise
    return "accepted"
