"""What a round of OptEx moves through memory beyond its gradients: docs/cost.md in Python.

The unit is the row, d numbers read or written once by one torch call, as if nothing stayed in a cache between
two calls. A step of the base optimizer counts as one pass over its operands, since the flat stepper cuts long
vectors into pieces that stay in a cache; all else is what the calls themselves touch. Counted are rounds of a
deterministic source that are kept whole, float32 throughout, on vectors longer than linalg's short rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["MODELS", "STATES", "Setting", "Work", "least_rows", "memory_rows", "round_work", "total"]

# What a method's predictions are made of. The default is a committee, whose curl-free member is counted.
MODELS: Final = {
    "optex-paper": "separable",
    "separable": "separable",
    "curl-free": "curl-free",
    "hold-last": "hold-last",
    "default": "curl-free",
}
STATES: Final = {"sgd": 0, "momentum": 1, "adam": 2}  # numbers a parameter that the base optimizer keeps


@dataclass(frozen=True)
class Work:
    """Rows read or written, and torch calls that touch any; a base optimizer's step is one call."""

    rows: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.rows + other.rows, self.calls + other.calls)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.rows, times * self.calls)


NOTHING: Final = Work()
COPY: Final = Work(2, 1)  # one read, one written
BETWEEN: Final = Work(3, 1)  # sum or difference of two rows
LENGTH: Final = Work(1, 1)  # norm of a row, or its sum


def _products(left: int, right: int) -> Work:
    return Work(left + right, 1)


@dataclass(frozen=True)
class Setting:
    """A round.

    Attributes:
        method: one of ``MODELS``.
        history: T0.
        parallelism: N, with K > 1 where it is 1: else the round is the base optimizer's step.
        steps: K, drafted and kept.
        state: s, numbers a parameter in the base optimizer's state.
        moves: share of the rounds that move the history's anchor.
        judged: share of the rounds that judge a committee; one in two by default, 0 for other methods.
    """

    method: str
    history: int
    parallelism: int
    steps: int
    state: int
    moves: float = 0.0
    judged: float = 0.5

    @property
    def model(self) -> str:
        """What predicts."""
        return MODELS[self.method]

    @property
    def replays(self) -> bool:
        """Whether all steps are taken again, and not the last one alone, as published."""
        return self.method != "optex-paper"

    @property
    def compared(self) -> int:
        """Proxies at which a gradient is predicted: all but the last, at which the draft ends."""
        return self.parallelism - 1 if self.parallelism > 1 else 1

    @property
    def base_step(self) -> Work:
        """p, g and state read, p and state written, after a copy of g into the flat gradient."""
        return COPY + Work(3 + 2 * self.state, 1)

    @property
    def located(self) -> Work:
        """A point seen from the history's iterates: its offset from the anchor, that one's length, and D."""
        return BETWEEN + LENGTH + _products(1, self.history)

    @property
    def asked(self) -> Work:
        """A point's products with what the model looks at."""
        on_gradients = _products(1, self.history)
        return {"separable": self.located, "curl-free": self.located + on_gradients}.get(self.model, NOTHING)

    @property
    def combined(self) -> Work:
        """A prediction from its coefficients: G, then D and the point's offset added to it."""
        on_g = Work(self.history + 1, 1)
        on_d = Work(self.history + 2, 1)
        return {"separable": on_g, "curl-free": on_g + on_d + BETWEEN}.get(self.model, NOTHING)

    @property
    def difference(self) -> Work:
        """μ(here) - μ(there) added to a gradient; products with the origin are in the Gram matrices."""
        if self.model == "hold-last":
            return LENGTH + BETWEEN  # zeros, made and added
        offsets = 2 * BETWEEN if self.model == "curl-free" else NOTHING
        return self.asked + self.combined + offsets + BETWEEN


def round_work(setting: Setting) -> dict[str, Work]:
    """The work of each part of a round, by its name in docs/how-it-works.md; "mark" comes before the draft."""
    return {
        "mark": (2 + 2 * setting.state) * COPY,  # kept to go back to, and copied to walk on from
        "draft": _draft(setting),
        "evaluate": _checks(setting),
        "remember": _remember(setting),
        "replay": _replay(setting),
    }


def total(parts: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(parts, NOTHING)


def _draft(setting: Setting) -> Work:
    n, steps = setting.parallelism, setting.steps - 1 if setting.parallelism > 1 else 0
    # At a proxy the nearest pair is looked for, whatever predicts, and the prediction is kept.
    seen = setting.asked if setting.asked.rows else setting.located
    proxies = setting.compared * (seen + setting.combined + COPY)
    others = max(steps - (n - 1), 0) * (COPY + setting.asked + setting.combined)
    places = Work(n, 1) + 2 * COPY + (n - 1) * (2 * COPY)  # zeros for predictions; points read and kept
    return places + proxies + others + steps * setting.base_step


def _checks(setting: Setting) -> Work:
    """Gradients are summed to see that they are finite, and measured to see that they are not absurd."""
    n = setting.parallelism
    return Work(n, 1) + (n * LENGTH if setting.replays and n > 1 else NOTHING)


def _remember(setting: Setting) -> Work:
    n, t0 = setting.parallelism, setting.history
    errors = Work(3 * setting.compared, 1) + 2 * setting.compared * LENGTH
    saved = written = 2 * Work(2 * n, 1)  # rows that are overwritten, and the new ones: of D and of G
    seen = setting.asked if setting.asked.rows else setting.located
    last = (n - setting.compared) * seen  # the proxy at which the draft ended
    grams = Work(2 * n + 1, 1) + _products(n, 0)  # offsets from the anchor, and their products
    if setting.model == "curl-free":
        grams += _products(n, t0) + _products(n, n)  # gradients with D and with the offsets
    judging = NOTHING
    if setting.method == "default":  # G with the last round's gradients, which were not judged, and with these
        missed = Work(2 * n, 1) + _products(n, t0)
        judging = setting.judged * (missed + _products(n, t0) + _products(n, 0))
    return errors + saved + last + grams + judging + written + setting.moves * _move(setting)


def _move(setting: Setting) -> Work:
    """A new anchor: D less the shift, and its products; a curl-free process needs G's with it, too."""
    t0 = setting.history
    moved = BETWEEN + Work(2 * t0 + 1, 1) + COPY + _products(t0, 0)
    return moved + (_mixed(t0) if setting.method == "curl-free" else NOTHING)


def _mixed(history: int) -> Work:
    """All products of G with D."""
    return _products(history, history)


def _replay(setting: Setting) -> Work:
    n, k, state = setting.parallelism, setting.steps, setting.state
    handed_over = COPY + (1 + state) * COPY + COPY + LENGTH  # with the last gradient; then: all finite?
    if not setting.replays:
        return setting.base_step + handed_over
    learning = (n - 1) * (BETWEEN + COPY + LENGTH)  # the draft's steps, that distances are measured in
    rewound = (1 + state) * COPY if n > 1 else NOTHING
    own = (n - 1) * 2 * (BETWEEN + LENGTH)  # from the step before, and from the step's own proxy
    nearest = (k - n) * (n + 1) * (BETWEEN + LENGTH)  # or from the nearest of all
    steps = k * setting.base_step + (k - 1) * (COPY + setting.difference) + own + nearest
    if (
        setting.method == "default"
    ):  # fits when it is first asked, and does not know the first origin's products
        steps += setting.moves * (_mixed(setting.history) + _products(1, setting.history))
    ends = COPY + LENGTH + (COPY + BETWEEN + LENGTH if n == 1 else NOTHING)
    return learning + rewound + steps + ends + handed_over


def least_rows(setting: Setting) -> float:
    """Rows of a round that read each row once a prediction, kept nothing twice and copied nothing.

    A prediction needs G (a separable process), or G and D (a curl-free one), and its point's products with the
    same rows and D; all in one pass, in which the base optimizer steps as well, block by block. New pairs are
    read and written once, and their products take one more pass over the rows.
    """
    n, k, t0 = setting.parallelism, setting.steps, setting.history
    stored = {"separable": 2 * t0, "curl-free": 2 * t0}.get(setting.model, 0)
    drafted = k - 1 if n > 1 else 0
    steps = drafted + (k if setting.replays else 1)
    predictions = drafted + (k - 1 if setting.replays else 0)
    return predictions * stored + steps * (3 + 2 * setting.state) + 4 * n + stored


def memory_rows(setting: Setting) -> float:
    """The formula in OptEx's docstring, in rows, where the anchor moves and no step waits."""
    return 3 * setting.history + 1 + 5 * setting.parallelism + 2 * (1 + setting.state)
