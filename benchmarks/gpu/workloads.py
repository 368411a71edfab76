"""What the seconds are measured on: problems with a rate of Adam and a number of steps, full and tiny."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from burgers import Burgers
from made_up import STAND_INS
from torch.func import replace_all_batch_norm_modules_

from optex.studies.problems import PROBLEMS, Problem, make_problem
from optex.studies.problems.data import find


@dataclass(frozen=True)
class Workload:
    """A problem, its options, the rate of Adam, and vanilla's steps."""

    problem: str
    options: dict[str, Any]
    batch_size: int
    steps: int
    every: int  # rounds between evaluations
    lr: float = 1e-3

    @property
    def stands_in(self) -> str | None:
        """The data set that is not on this machine, if any: made-up data is used for it."""
        data = PROBLEMS[self.problem].data if self.problem in PROBLEMS else None
        return data if data is not None and find(data) is None else None

    def start(self, device: str, factor: int = 1) -> Problem:
        """The problem on the device, its batches ``factor`` times as large."""
        options = {"seed": 0, "batch_size": self.batch_size * factor, **self.options}
        if self.problem == Burgers.name:
            problem: Problem = Burgers(**options)
        elif self.stands_in is not None:
            problem = STAND_INS[self.stands_in](**options)
        else:
            problem = make_problem(self.problem, **options)
        # Running statistics cannot be shared by points evaluated at once; all methods do without them.
        replace_all_batch_norm_modules_(problem)
        return problem.to(device)


WORKLOADS = {
    "digits-mlp": Workload("digits-mlp", {}, 32, 400, 5),
    "deep-mlp": Workload("fashion-mnist", {"width": 32, "depth": 12}, 64, 400, 5),
    "fashion-mlp": Workload("fashion-mnist", {}, 64, 400, 5),
    "resnet-20": Workload("cifar10", {"model": "resnet", "depth": 20}, 64, 800, 10),
    "resnet-20-small": Workload("cifar10", {"model": "resnet", "depth": 20, "width": 4}, 32, 240, 5),
    "shakespeare": Workload("shakespeare", {}, 16, 240, 5),
    "transformer-10m": Workload(
        "shakespeare", {"layers": 6, "heads": 6, "width": 384, "context": 256}, 64, 800, 10
    ),
    "burgers": Workload("burgers", {}, 1024, 800, 10),
    "cartpole": Workload("cartpole", {}, 64, 800, 10),
}

_IMAGES = {"train_size": 400, "held_size": 40}
_TEXT = {"layers": 1, "heads": 2, "width": 16, "context": 16, "held_size": 8}

QUICK = {  # the same kinds, tiny
    "digits-mlp": Workload("digits-mlp", {}, 8, 12, 3),
    "deep-mlp": Workload("fashion-mnist", {"width": 8, "depth": 4, **_IMAGES}, 8, 12, 3),
    "fashion-mlp": Workload("fashion-mnist", {"width": 8, **_IMAGES}, 8, 12, 3),
    "resnet-20": Workload("cifar10", {"model": "resnet", "width": 2, "depth": 8, **_IMAGES}, 4, 6, 3),
    "resnet-20-small": Workload("cifar10", {"model": "resnet", "width": 2, "depth": 8, **_IMAGES}, 4, 6, 3),
    "shakespeare": Workload("shakespeare", _TEXT, 4, 12, 3),
    "transformer-10m": Workload("shakespeare", {**_TEXT, "layers": 2, "width": 32}, 4, 6, 3),
    "burgers": Workload("burgers", {"width": 8, "depth": 2}, 32, 12, 3),
    "cartpole": Workload("cartpole", {"hidden": 8, "warm_up": 100}, 8, 12, 3),
}
