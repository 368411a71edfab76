"""Several estimators, judged on gradients they have not seen; the one that does best predicts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from optex.checks import check_integer, check_real, saved_integer, saved_tensor, shown
from optex.errors import NotPositiveDefiniteError
from optex.estimators.arrivals import Arrivals
from optex.estimators.curl_free import CurlFreeEstimator
from optex.estimators.history import GradientHistory, Locations
from optex.estimators.hold_last import HoldLast
from optex.estimators.interface import Coefficients, Estimator, Posterior
from optex.estimators.judgement import squared_errors
from optex.small import jitter_unsaid

__all__ = ["CommitteeEstimator", "CommitteePosterior", "default_members"]

YOUNG: Final = 8  # rounds
HANDICAP: Final = 0.2  # in nats of error


def default_members() -> tuple[Estimator, ...]:
    """Curl-free processes for gradients with kinks, for smooth ones and for three sizes of noise; hold-last.

    The one for the most noise has a least-squares mean: the last gradient would bring its noise along.
    """
    return (
        CurlFreeEstimator("matern-5/2", median_multiple=10.0, noise_variance=1e-6),
        CurlFreeEstimator("rbf", median_multiple=3.0, noise_variance=1e-9),
        CurlFreeEstimator("matern-5/2", median_multiple=10.0, noise_variance=1e-2),
        CurlFreeEstimator("matern-5/2", median_multiple=10.0, noise_variance=1e-1),
        CurlFreeEstimator("matern-5/2", median_multiple=10.0, noise_variance=1.0, prior_mean="gls"),
        HoldLast(),
    )


class CommitteeEstimator(Estimator):
    """Choose kernel, length scale and noise online, by how well each choice predicted.

    Every round brings true gradients at points that no member has seen. With E_c = log ‖μ_c(x_i) - g_i‖, each
    member's score follows the excess of its error over the best member's,

        score_c ← memory · score_c + (1 - memory) · mean_i (E_c - min_c E_c),

    and the member with the lowest score predicts until the next round. This is cross-validation forward in
    time: leaving one pair out of the history instead asks for interpolation, and members that extrapolate
    badly pass that test.

    Args:
        members: estimators to choose from; ``default_members()`` by default. Of equal scores the first wins.
            If gradients carry noise of unknown size, ``HANDICAP`` is added to the scores of all members but
            those that assume the most noise, and decays like the scores: fitting noise does more harm than
            smoothing.
        memory: how slowly scores forget, in [0, 1).
        interval: rounds from one judgement to the next, at least 1; judging fits every member. Where gradients
            are sampled, each of the first ``YOUNG`` rounds is judged, as a single judgement may be chance.

    A member whose kernel matrix needs jitter gives no warning here: what it predicts is judged, jitter and all.

    Raises:
        TypeError: a member is no estimator.
        ValueError: no members, or a number out of range.

    Source: Dawid, *Present position and potential developments: the prequential approach*, 1984.
    """

    def __init__(
        self, members: Sequence[Estimator] | None = None, *, memory: float = 0.7, interval: int = 2
    ) -> None:
        if members is not None and not isinstance(members, Sequence):
            raise TypeError(f"CommitteeEstimator: members must be a list of estimators, got {shown(members)}")
        self.members: tuple[Estimator, ...] = tuple(default_members() if members is None else members)
        if not self.members:
            raise ValueError("CommitteeEstimator: members is empty; name at least one estimator")
        for member in self.members:
            if not isinstance(member, Estimator):
                raise TypeError(f"CommitteeEstimator: members must be estimators, got {shown(member)}")
        if not 0 <= check_real("CommitteeEstimator", "memory", memory) < 1:
            raise ValueError(f"CommitteeEstimator: memory must be in [0, 1), got {shown(memory)}")
        self.memory = memory
        check_integer("CommitteeEstimator", "interval", interval)
        self.interval = interval
        self._rounds = self._judged = 0
        self.scores: Tensor = torch.zeros(len(self.members), dtype=torch.float64)

    def best(self, history: GradientHistory) -> int:
        """Index of the member that predicts."""
        return int((self.scores + self._handicaps(history)).argmin())

    def _handicaps(self, history: GradientHistory) -> Tensor:  # [members]
        assumed = [member.assumed_noise_variance for member in self.members]
        weight = HANDICAP * self.memory**self._judged if history.is_sampled else 0.0
        return torch.tensor([weight * (noise < max(assumed)) for noise in assumed], dtype=torch.float64)

    def fit(self, history: GradientHistory) -> CommitteePosterior:
        return CommitteePosterior(self.members, self.best(history), history)

    def judge(
        self, posterior: Posterior, arrivals: Arrivals, held: Sequence[tuple[Tensor, Tensor] | None]
    ) -> None:
        if not isinstance(posterior, CommitteePosterior) or not len(arrivals):
            return
        self._rounds += 1
        young = posterior.history.is_sampled and self._rounds <= YOUNG
        if not young and (self._rounds - 1) % self.interval:
            return
        with np.errstate(all="ignore"):  # a member may predict NaN
            squares = squared_errors(posterior.fitted, arrivals, held)  # [members, n]
        floor = torch.finfo(torch.float64).tiny
        errors = squares.to("cpu").nan_to_num(nan=torch.inf).clamp_min(floor).log() / 2
        excess = (errors - errors.amin(0)).mean(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
        kept = self.memory * self.scores if self.memory else torch.zeros_like(self.scores)  # 0 · inf is NaN
        self.scores = posterior.history.space.broadcast(kept + (1 - self.memory) * excess)
        self._judged += 1

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores.clone(), "rounds": self._rounds, "judged": self._judged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        owner = "CommitteeEstimator.load_state_dict"
        scores = saved_tensor(owner, state, "scores", (len(self.members),), finite=False)
        if scores.isnan().any():
            raise ValueError(f"{owner}: saved scores are not numbers")
        rounds, judged = (saved_integer(owner, state, name) for name in ("rounds", "judged"))
        self.scores, self._rounds, self._judged = scores.to("cpu", torch.float64, copy=True), rounds, judged

    def __repr__(self) -> str:
        members = ", ".join(map(repr, self.members))
        return f"CommitteeEstimator({members}, memory={self.memory}, interval={self.interval})"


def _fit(member: Estimator, history: GradientHistory) -> Posterior:
    # No warning: a member that needs jitter is judged by how it predicts with it, and one that cannot be fitted
    # at all by how the last gradient predicts in its place.
    try:
        return jitter_unsaid(lambda: member.fit(history))
    except NotPositiveDefiniteError:
        return HoldLast().fit(history)


class CommitteePosterior(Posterior):
    """``CommitteeEstimator`` fitted: the best member predicts; the others are fitted when judged."""

    def __init__(self, members: Sequence[Estimator], best: int, history: GradientHistory) -> None:
        super().__init__(history)
        self._members = members
        self._best = best

    @cached_property
    def chosen(self) -> Posterior:
        """The member that predicts."""
        return _fit(self._members[self._best], self.history)

    @cached_property
    def fitted(self) -> list[Posterior]:
        """All members."""
        return [
            self.chosen if i == self._best else _fit(member, self.history)
            for i, member in enumerate(self._members)
        ]

    def coefficients(self, locations: Locations) -> Coefficients:
        return self.chosen.coefficients(locations)

    def means(self, locations: Locations) -> Tensor:
        return self.chosen.means(locations)

    def differences(self, locations: Locations, origins: Locations) -> Tensor:
        return self.chosen.differences(locations, origins)

    def variance(self, point: Tensor) -> Tensor:
        return self.chosen.variance(point)

    def prior_variance(self) -> Tensor:
        return self.chosen.prior_variance()
